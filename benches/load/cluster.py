#!/usr/bin/env python3
"""What a cluster costs, and what a client waits for when a node dies (loopback only, stdlib only).

Starts its own nodes and ends them.

  cluster.py gaps BINARY [--signal KILL|STOP] [--repeat N]   three nodes; the busiest generator is killed or stopped
  cluster.py hop BINARY                                       two nodes; a request computed where it arrives, or one hop on
  cluster.py journal BINARY                                   three nodes, beside one alone: throughput and CPU time
"""
import argparse, contextlib, http.client, json, os, shutil, signal, socket, subprocess, sys, tempfile, threading, time, urllib.request

ROOM = ['--memory-warn-mark', '1', '--memory-shrink-mark', '1', '--memory-removal-mark', '1', '--threads', '1']
STREAMS = 12


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class Node:
    started, logs = [], set()

    def __init__(self, binary, name, key, folder, gossip, seeds, model=()):
        self.port, self.admin, self.name, self.gossip = free_port(), free_port(), name, gossip
        cluster = ['--gossip-addr', f'127.0.0.1:{gossip}', '--cluster-key-file', key, '--node-id', name,
                   '--admin-addr', f'127.0.0.1:{self.admin}'] if key else []
        for seed in seeds:
            cluster += ['--peers', f'127.0.0.1:{seed}']
        self.command = [binary, 'serve', '--port', str(self.port), *cluster, *ROOM, *model]
        self.log = os.path.join(folder, name)
        self.logs.add(self.log)
        self.start()

    def start(self):
        out = open(self.log, 'ab')
        self.process = subprocess.Popen(self.command, stdout=out, stderr=out)
        self.started.append(self.process)

    def get(self, path, port=None):
        return json.load(urllib.request.urlopen(f'http://127.0.0.1:{port or self.port}{path}', timeout=5))

    def wait(self, peers):
        """Until it is ready and sees so many ready peers."""
        for _ in range(600):
            try:
                self.get('/readyz')
                if not peers or sum(p['report']['ready'] for p in self.get('/cluster', self.admin)['peers']) >= peers:
                    return self
            except OSError:
                pass
            time.sleep(0.1)
        sys.exit(f'{self.name} is not ready; see {self.log}')

    @classmethod
    def end_all(cls):
        while cls.started:
            process = cls.started.pop()
            process.kill()
            process.wait()

    def cpu(self):
        """Seconds of CPU time that the process has had."""
        fields = open(f'/proc/{self.process.pid}/stat').read().rsplit(')', 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def cluster(binary, folder, count, models=None):
    key = os.path.join(folder, 'key')
    with open(key, 'wb') as f:
        f.write(os.urandom(32))
    gossip = [free_port() for _ in range(count)]
    return [Node(binary, f'n{i}', key, folder, gossip[i], gossip[:i] + gossip[i + 1:], models[i] if models else ())
            for i in range(count)]


@contextlib.contextmanager
def scratch(keep_logs=None):
    """A folder for nodes. At the end they are ended, and their logs are copied to another folder if one is given."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield folder
        finally:
            Node.end_all()
            keep_logs and os.makedirs(keep_logs, exist_ok=True)
            for log in Node.logs if keep_logs else ():
                shutil.copy(log, keep_logs)


def stream(port, body, headers=()):
    """The times at which tokens came, and what went wrong."""
    request = urllib.request.Request(f'http://127.0.0.1:{port}/v1/completions', data=json.dumps(body).encode(),
                                     headers={'content-type': 'application/json', **dict(headers)})
    times = []
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            for line in response:
                if line.startswith(b'data: [DONE]'):
                    return times, None
                if line.startswith(b'data: '):
                    times.append(time.perf_counter())
                    if b'"error"' in line:
                        return times, line.decode()
    except OSError as error:
        return times, repr(error)
    return times, 'cut'


def in_parallel(calls):
    results = [None] * len(calls)
    def run(i):
        results[i] = calls[i]()
    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    return lambda: [thread.join() for thread in threads] and results


def prefill(port, tokens, seed):
    """Seconds that an idle node takes to compute a prompt of so many tokens that it has not seen."""
    prompt = [(seed * 7 + i * 7919) % 40000 + 10 for i in range(tokens)]
    begin = time.perf_counter()
    times, error = stream(port, {'prompt': prompt, 'max_tokens': 1, 'stream': True}, {'x-outrigger-placement': 'balanced'}.items())
    assert times and not error, error
    return times[0] - begin


def quantile(values, q):
    return sorted(values)[min(len(values) - 1, int(len(values) * q))]


def gaps(args, folder):
    nodes = cluster(args.binary, folder, 3)
    entry, by_name = nodes[0], {node.name: node for node in nodes}
    all_gaps, beyond, failed = [], [], 0
    for run in range(args.repeat):
        entry.wait(2)
        time.sleep(1)
        body = lambda i: {'prompt': f'Run {run} number {i}: the sea is', 'max_tokens': args.tokens, 'stream': True, 'seed': i,
                          'temperature': 0.8 * (i % 2), 'ignore_eos': True}
        placed = {'x-outrigger-placement': 'least-request'}.items()
        results = in_parallel([lambda i=i: stream(entry.port, body(i), placed) for i in range(STREAMS)])
        time.sleep(1)
        peers = {p['id']: p['streams'] for p in entry.get('/cluster', entry.admin)['peers']}
        victim = by_name[max(peers, key=peers.get)]
        moved, begin = peers[victim.name], time.perf_counter()
        victim.process.send_signal(getattr(signal, f'SIG{args.signal}'))
        results = results()
        found = []
        for times, error in results:
            failed += error is not None
            before, after = [t for t in times if t <= begin + 0.02], [t for t in times if t > begin + 0.02]
            if before and after:
                found.append((after[0] - before[-1], len(before)))
        found = sorted(found, reverse=True)[:moved]
        if args.signal == 'STOP':
            victim.process.send_signal(signal.SIGCONT)
        else:
            victim.process.wait()
        survivor = next(node for node in nodes[1:] if node is not victim)
        tokens = sum(count + 12 for _, count in found)
        # Two survivors share the work.
        alone = prefill(survivor.port, max(1, tokens // 2), run)
        print(f'{run}: {moved} streams with {tokens} tokens moved; gaps', [round(gap, 3) for gap, _ in found],
              f'prefill of half of it alone {alone:.3f} s', flush=True)
        all_gaps += [gap for gap, _ in found]
        beyond += [gap - alone for gap, _ in found]
        if args.signal == 'KILL':
            victim.start()
    print(f'SIG{args.signal}: {len(all_gaps)} streams moved, {failed} failed; gap p50 {quantile(all_gaps, .5):.3f} s, '
          f'p99 {quantile(all_gaps, .99):.3f} s; beyond the prefill p50 {quantile(beyond, .5):.3f} s, '
          f'p99 {quantile(beyond, .99):.3f} s')



def hop(args, folder):
    fixture = ['--model', os.path.join(os.path.dirname(__file__), '../../models/fixtures/llama-gqa-tied-bf16')]
    nodes = cluster(args.binary, folder, 2, [fixture + ['--served-model-name', name] for name in 'ab'])
    nodes[0].wait(1), nodes[1].wait(1)
    body = json.dumps({'model': 'b', 'prompt': [5, 6, 7, 8], 'max_tokens': 1, 'ignore_eos': True})

    def latencies(port, count=3000):
        connection = http.client.HTTPConnection('127.0.0.1', port)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            connection.request('POST', '/v1/completions', body, {'content-type': 'application/json'})
            response = connection.getresponse()
            assert (response.read() and response.status) == 200
            times.append(time.perf_counter() - begin)
        return times[count // 10:]

    for _ in range(args.repeat):
        here, there = latencies(nodes[1].port), latencies(nodes[0].port)
        row = lambda q: (1e3 * quantile(here, q), 1e3 * quantile(there, q))
        print('one hop: p50 %.3f ms instead of %.3f' % row(.5)[::-1] + ', p99 %.3f ms instead of %.3f' % row(.99)[::-1], flush=True)



def journal(args, folder):
    nodes = cluster(args.binary, folder, 3) + [Node(args.binary, 'alone', None, folder, 0, ())]
    nodes[0].wait(2), nodes[3].wait(0)
    count, tokens = 16, 256
    body = lambda i: {'prompt': f'Cost {i}: the sea is', 'max_tokens': tokens, 'stream': True, 'temperature': 0, 'ignore_eos': True}
    for run in range(args.repeat + 1):
        for node in nodes[0], nodes[3]:
            spent, begin = node.cpu(), time.perf_counter()
            errors = [error for _, error in in_parallel([lambda i=i: stream(node.port, body(i)) for i in range(count)])() if error]
            rate = count * tokens / (time.perf_counter() - begin)
            # The first one warms the prefix cache.
            if run:
                print(f'{node.name}: {rate:.0f} tok/s, {node.cpu() - spent:.2f} s of CPU time', *errors, flush=True)



def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['gaps', 'hop', 'journal'])
    parser.add_argument('binary')
    parser.add_argument('--signal', choices=['KILL', 'STOP'], default='KILL')
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--tokens', type=int, default=300)
    args = parser.parse_args()
    with scratch() as folder:
        globals()[args.what](args, folder)


if __name__ == '__main__':
    main()
