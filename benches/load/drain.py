#!/usr/bin/env python3
"""Restarts the nodes of a cluster under clients that go round all addresses, and counts what fails (loopback, stdlib only).

  drain.py BINARY [--orders each,two] [--kinds whole,streams,keep-alive,http2,prefill] [--requests 500] [--other BINARY]

Three nodes with a model of random weights. A failure is an answer other than 2xx, a connection that breaks after it was
accepted, or a token that differs from the same request's undisturbed one. A refused connection is a failure only if no other
address answers within a second. Exit code 1 if anything failed.

  orders      each: each node in turn, the next as soon as the last is ready again; two: two of the three at one time
  kinds       whole: answers without streaming, streams: server-sent events; both with a connection for each request
              keep-alive: whole answers on connections that are kept; http2: the same with HTTP/2
              prefill: streams with prompts that take a while
  other       another version: whenever a node restarts, it changes from one binary to the other, so the cluster is upgraded
              and goes back, again and again
"""
import argparse, collections, http.client, json, os, select, shutil, signal, socket, struct, sys, threading, time
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from cluster import cluster, scratch

FIXTURE = os.path.join(os.path.dirname(os.path.abspath(__file__)), '../../models/fixtures/llama-gqa-tied-bf16')
SIZES = {'small': dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=8, max_position_embeddings=2048),
         'large': dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, max_position_embeddings=8192)}
REFUSAL_PATIENCE = 1.0
ANSWER_PATIENCE = 120


class Failed(Exception):
    """The request has failed."""


class Refused(Exception):
    """Nobody listens there."""


class NotTaken(Exception):
    """The server said that it has not begun with the request: it may be sent again."""


class Http1:
    """A connection that is kept as long as the server lets it be."""

    def __init__(self, port):
        self.connection = http.client.HTTPConnection('127.0.0.1', port, timeout=ANSWER_PATIENCE)
        try:
            self.connection.connect()
        except OSError as error:
            raise Refused(repr(error))
        self.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def usable(self):
        # As connection pools do: a connection on which something came between two requests was closed.
        return self.connection.sock is not None and not select.select([self.connection.sock], [], [], 0)[0]

    def post(self, path, body):
        self.connection.request('POST', path, body, {'content-type': 'application/json'})
        response = self.connection.getresponse()
        text = response.read()
        return response.status, text

    def close(self):
        self.connection.close()


class Http2:
    """As much of HTTP/2 as one request after the other needs."""
    DATA, HEADERS, RST, SETTINGS, PING, GOAWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8

    def __init__(self, port):
        try:
            self.socket = socket.create_connection(('127.0.0.1', port), timeout=ANSWER_PATIENCE)
        except OSError as error:
            raise Refused(repr(error))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.read, self.next, self.last, self.gone = b'', 1, None, False
        self.socket.sendall(b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n')
        self.send(self.SETTINGS, 0, 0, struct.pack('>HI', 4, 1 << 24))
        # Enough for all answers on one connection: the end of an answer needs no update of the window.
        self.send(self.WINDOW, 0, 0, struct.pack('>I', 1 << 30))

    def send(self, kind, flags, stream, payload):
        self.socket.sendall(struct.pack('>I', len(payload))[1:] + bytes([kind, flags]) + struct.pack('>I', stream) + payload)

    def frame(self):
        def exactly(count):
            while len(self.read) < count:
                piece = self.socket.recv(65536)
                if not piece:
                    raise EOFError('the connection ended')
                self.read += piece
            taken, self.read = self.read[:count], self.read[count:]
            return taken
        head = exactly(9)
        payload = exactly(int.from_bytes(head[:3], 'big'))
        return head[3], head[4], int.from_bytes(head[5:], 'big') & 0x7fffffff, payload

    def common(self, kind, flags, payload):
        """What concerns the connection."""
        if kind == self.SETTINGS and not flags & 1:
            self.send(self.SETTINGS, 1, 0, b'')
        elif kind == self.PING and not flags & 1:
            self.send(self.PING, 1, 0, payload)
        elif kind == self.GOAWAY:
            self.last, self.gone = int.from_bytes(payload[:4], 'big') & 0x7fffffff, True

    def usable(self):
        try:
            while select.select([self.socket], [], [], 0)[0]:
                kind, flags, _, payload = self.frame()
                self.common(kind, flags, payload)
        except (OSError, EOFError):
            return False
        return not self.gone

    def post(self, path, body):
        def field(name, value):
            # HPACK: a literal that is not indexed, with a new name, without Huffman.
            return b'\0' + bytes([len(name)]) + name + bytes([len(value)]) + value
        stream, self.next = self.next, self.next + 2
        fields = {':method': 'POST', ':scheme': 'http', ':path': path, ':authority': 'localhost', 'content-type': 'application/json'}
        self.send(self.HEADERS, 4, stream, b''.join(field(n.encode(), v.encode()) for n, v in fields.items()))
        self.send(self.DATA, 1, stream, body.encode())
        status, text = None, b''
        while True:
            try:
                kind, flags, of, payload = self.frame()
            except (OSError, EOFError):
                if self.gone and stream > self.last:
                    raise NotTaken()
                raise
            self.common(kind, flags, payload)
            if self.gone and stream > self.last:
                raise NotTaken()
            if of != stream:
                continue
            if kind == self.RST:
                if int.from_bytes(payload, 'big') == 7:
                    raise NotTaken()
                raise Failed(f'the stream was reset ({int.from_bytes(payload, "big")})')
            if kind == self.HEADERS and status is None:
                # The static table's `:status 200`.
                status = 200 if payload[0] == 0x88 else 'not 200:'
            if kind == self.DATA:
                text += payload
                if payload and not flags & 1:
                    self.send(self.WINDOW, 0, stream, struct.pack('>I', len(payload)))
                    self.send(self.WINDOW, 0, 0, struct.pack('>I', len(payload)))
            if flags & 1 and kind in (self.DATA, self.HEADERS):
                return status, text

    def close(self):
        self.socket.close()


def tokens_of(text, streams):
    """The answer's tokens; what is wrong with an answer that is not whole."""
    if not streams:
        return json.loads(text)['choices'][0]['token_ids']
    tokens = []
    for line in text.decode().splitlines():
        if line == 'data: [DONE]':
            return tokens
        if line.startswith('data: '):
            chunk = json.loads(line[6:])
            if 'error' in chunk:
                raise Failed(f'in the stream: {chunk["error"]["code"]}')
            for choice in chunk['choices']:
                tokens += choice.get('token_ids') or []
    raise Failed('the stream ended without an end')


class Load:
    """Clients that go round all addresses for as long as they are wanted."""

    def __init__(self, ports, kind, bodies, references):
        self.ports, self.kind, self.bodies, self.references = ports, kind, bodies, references
        self.turn, self.lock = 0, threading.Lock()
        self.failures, self.done, self.refused, self.slowest = collections.Counter(), 0, 0, 0.0
        self.wanted = True

    def run(self, clients, last):
        """`last`: ends each client's connections; before, every request counts."""
        threads = [threading.Thread(target=self.client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            last()
        finally:
            self.wanted = False
        for thread in threads:
            thread.join()

    def take(self):
        with self.lock:
            self.turn += 1
            return self.turn

    def client(self):
        kept = {}
        while self.wanted:
            turn, begin = self.take(), time.perf_counter()
            number = turn % len(self.bodies)
            problem = None
            try:
                if self.request(turn, number, kept) != self.references[number]:
                    problem = 'other tokens'
            except Failed as error:
                problem = str(error)
            except Exception as error:
                problem = f'{type(error).__name__}: {error}'
            with self.lock:
                self.done += 1
                self.slowest = max(self.slowest, time.perf_counter() - begin)
                if problem:
                    self.failures[problem] += 1
        for connection in kept.values():
            connection.close()

    def request(self, turn, number, kept):
        keeps = self.kind in ('keep-alive', 'http2')
        make = Http2 if self.kind == 'http2' else Http1
        since = None
        for attempt in range(1 << 20):
            port = self.ports[(turn + attempt) % len(self.ports)]
            connection = kept.pop(port, None)
            try:
                if connection is None or not connection.usable():
                    connection = make(port)
            except Refused as error:
                with self.lock:
                    self.refused += 1
                since = since or time.perf_counter()
                if time.perf_counter() - since > REFUSAL_PATIENCE:
                    raise Failed('no address answers')
                time.sleep(0.01)
                continue
            try:
                status, text = connection.post('/v1/completions', json.dumps(self.bodies[number]))
            except NotTaken:
                connection.close()
                continue
            except BaseException:
                connection.close()
                raise
            if keeps:
                kept[port] = connection
            else:
                connection.close()
            if status != 200:
                code = text.decode(errors='replace')[:300]
                try:
                    code = json.loads(text)['error']['code']
                except (ValueError, KeyError):
                    pass
                raise Failed(f'{status} {code}')
            return tokens_of(text, self.bodies[number]['stream'])


def bodies_of(kind, args):
    prompt = args.prefill_tokens if kind == 'prefill' else 12
    return different_bodies(args.bodies, prompt, {'prefill': 4, 'streams': 48}.get(kind, 24), kind in ('streams', 'prefill'))


def different_bodies(count, prompt, tokens, streams=False):
    """Requests with prompts of so many tokens, every other one sampled."""
    return [{'prompt': [(i * 31 + k * 7919) % 200 + 20 for k in range(prompt)], 'max_tokens': tokens, 'ignore_eos': True, 'seed': i,
             'temperature': 0.8 * (i % 2), 'return_token_ids': True, 'stream': streams} for i in range(count)]


def restart(nodes, other):
    for node in nodes:
        node.process.send_signal(signal.SIGTERM)
    codes = [node.process.wait() for node in nodes]
    for node in nodes:
        if other:
            node.command[0], node.other = getattr(node, 'other', other), node.command[0]
        node.start()
    for node in nodes:
        node.wait(2)
    return codes


def disturb(nodes, order, load, requests, other):
    """Restarts in rounds until there were enough requests."""
    codes, rounds = [], 0
    while rounds == 0 or load.done < requests:
        if order == 'each':
            for node in nodes:
                codes += restart([node], other)
        else:
            for first in range(3):
                codes += restart([nodes[first], nodes[(first + 1) % 3]], other)
        rounds += 1
    bad = [code for code in codes if code]
    if bad:
        load.failures[f'exit codes {bad}'] += 1
    return rounds


def measure(nodes, order, kind, args):
    bodies = bodies_of(kind, args)
    def reference(body):
        status, text = Http1(nodes[0].port).post('/v1/completions', json.dumps(body))
        assert status == 200, text
        return tokens_of(text, body['stream'])
    begin = time.perf_counter()
    references = [reference(body) for body in bodies]
    alone = (time.perf_counter() - begin) / len(bodies)
    load, begin, rounds = Load([node.port for node in nodes], kind, bodies, references), time.perf_counter(), []
    clients = args.clients if kind != 'prefill' else args.prefill_clients
    requests = args.requests if kind != 'prefill' else 0
    load.run(clients, lambda: rounds.append(disturb(nodes, order, load, requests, args.other)))
    seconds = time.perf_counter() - begin
    failed = sum(load.failures.values())
    print(f'| {order} | {kind} | {load.done} | {failed} | {load.refused} | {alone:.2f} | {load.slowest:.2f} | {seconds:.0f} |',
          *(f'{problem}: {count};' for problem, count in load.failures.most_common()), flush=True)
    return failed


def model(folder, size):
    path = os.path.join(folder, f'model-{size}')
    os.makedirs(path)
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        shutil.copy(os.path.join(FIXTURE, name), path)
    config = json.load(open(os.path.join(FIXTURE, 'config.json')))
    config.update(SIZES[size])
    json.dump(config, open(os.path.join(path, 'config.json'), 'w'))
    # Every prompt is computed: the same few come again and again.
    return ['--model', path, '--load-format', 'dummy', '--enable-prefix-caching', 'false']


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('binary')
    parser.add_argument('--other', metavar='BINARY', help='another version, to which nodes change when they restart')
    parser.add_argument('--orders', default='each,two')
    parser.add_argument('--kinds', default='whole,streams,keep-alive,http2,prefill')
    parser.add_argument('--requests', type=int, default=500, help='at least so many for each row; fewer with `prefill`')
    parser.add_argument('--clients', type=int, default=8)
    parser.add_argument('--prefill-clients', type=int, default=6)
    parser.add_argument('--prefill-tokens', type=int, default=1900)
    parser.add_argument('--bodies', type=int, default=12, help='different requests; each is computed once before, as the reference')
    parser.add_argument('--size', choices=SIZES, default='small')
    parser.add_argument('--keep-logs', metavar='FOLDER')
    parser.add_argument('--flags', default='', help='further flags of the nodes, in one string')
    args = parser.parse_args()
    failed = 0
    with scratch(args.keep_logs) as folder:
        flags = model(folder, args.size) + args.flags.split()
        nodes = cluster(args.binary, folder, 3, [flags] * 3)
        for node in nodes:
            node.wait(2)
        print('| order | requests | number | failures | refused connections | s undisturbed | s slowest | s in all |\n'
              '|---|---|---|---|---|---|---|---|', flush=True)
        for kind in args.kinds.split(','):
            for order in args.orders.split(','):
                failed += measure(nodes, order, kind, args)
    sys.exit(failed > 0)


if __name__ == '__main__':
    main()
