#!/usr/bin/env python3
"""Takes the CPU away from one of three nodes, and tells what clients feel and when the others notice (loopback, stdlib only).

  slow.py BINARY [--ways quota,stops] [--clients round,healthy,slow] [--placements balanced,…] [--seconds 15] [--all]

Three nodes with a model of random weights and one computing thread each. For each row: clients at healthy nodes for a while, then
one node is slowed down for as long, then it is let go. Every answer is compared with an undisturbed one. Exit code 1 if a request
failed or had a wrong token. Needs root for `quota`.

  ways        quota: a cgroup gives it 5 ms of CPU in 100 ms; stops: SIGSTOP and SIGCONT, it runs 0.1 s of 1.6 s
  clients     round: go round all addresses; healthy: at a node that is not slowed down; slow: at the one that is
  placements  of requests, by header: balanced, random, least-request, …
  --all       slows down all three: nothing should move
"""
import argparse, collections, json, os, signal, sys, threading, time, urllib.request
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from cluster import Node, cluster, quantile, scratch
from drain import different_bodies, model

PERIOD, SHARE = 100_000, 0.05


class Quota:
    """A control group with 5 % of a CPU."""

    def __init__(self, process):
        self.process, name = process, f'outrigger-slow-{process.pid}'
        v1 = os.path.isdir('/sys/fs/cgroup/cpu')
        self.root = '/sys/fs/cgroup/cpu' if v1 else '/sys/fs/cgroup'
        self.folder = os.path.join(self.root, name)
        os.mkdir(self.folder)
        limits = [('cpu.cfs_period_us', PERIOD), ('cpu.cfs_quota_us', int(PERIOD * SHARE))] if v1 \
            else [('cpu.max', f'{int(PERIOD * SHARE)} {PERIOD}')]
        for file, limit in limits:
            self.write(os.path.join(self.folder, file), limit)

    def write(self, file, value):
        with open(file, 'w') as f:
            f.write(str(value))

    def begin(self):
        self.write(os.path.join(self.folder, 'cgroup.procs'), self.process.pid)

    def end(self):
        self.write(os.path.join(self.root, 'cgroup.procs'), self.process.pid)
        os.rmdir(self.folder)


class Stops:
    """The process runs 0.1 s of every 1.6 s."""

    def __init__(self, process):
        self.process, self.over = process, threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        while not self.over.is_set():
            self.process.send_signal(signal.SIGSTOP)
            self.over.wait(1.5)
            self.process.send_signal(signal.SIGCONT)
            self.over.wait(0.1)

    def begin(self):
        self.thread.start()

    def end(self):
        self.over.set()
        self.thread.join()


WAYS = {'quota': Quota, 'stops': Stops}


def completion(port, body, placement):
    """The tokens, or what went wrong."""
    headers = {'content-type': 'application/json', 'x-outrigger-placement': placement}
    request = urllib.request.Request(f'http://127.0.0.1:{port}/v1/completions', json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)['choices'][0]['token_ids']
    except OSError as error:
        return repr(error)


class Load:
    """Clients, each with one request after the other."""

    def __init__(self, ports, placement, bodies, references):
        self.ports, self.placement, self.bodies, self.references = ports, placement, bodies, references
        self.done, self.turn, self.lock, self.problems = [], 0, threading.Lock(), collections.Counter()
        self.wanted = True

    def client(self):
        while self.wanted:
            with self.lock:
                self.turn += 1
                turn = self.turn
            begin, number = time.perf_counter(), turn % len(self.bodies)
            answer = completion(self.ports[turn % len(self.ports)], self.bodies[number], self.placement)
            with self.lock:
                self.done.append((begin, time.perf_counter() - begin))
                if answer != self.references[number]:
                    self.problems[answer if isinstance(answer, str) else 'other tokens'] += 1

    def times(self, begin, end):
        """Of the requests that were under way at any time between."""
        return [took for at, took in self.done if at < end and at + took >= begin]


class Watch:
    """Looks ten times a second at what the nodes say of one of them."""

    def __init__(self, node, observer):
        self.node, self.observer, self.looks, self.over = node, observer, [], threading.Event()
        self.threads = [threading.Thread(target=look) for look in (self.own, self.others)]

    def run(self, look):
        while not self.over.is_set():
            try:
                self.looks.append((look(), time.perf_counter()))
            except OSError:
                pass
            self.over.wait(0.1)

    def own(self):
        self.run(lambda: ('degraded', [reason['code'] for reason in self.node.get('/readyz').get('degraded', [])] != []))

    def others(self):
        def weight():
            peers = self.observer.get('/cluster', self.observer.admin)['peers']
            return next((peer['weight'] for peer in peers if peer['id'] == self.node.name), 1.0)
        self.run(lambda: ('weight', weight()))

    def after(self, since, what, holds):
        """Seconds until it was first seen, a dash if it never was."""
        seen = [at - since for (name, value), at in list(self.looks) if name == what and at >= since and holds(value)]
        return f'{min(seen):.1f}' if seen else '–'


def counted(nodes):
    """Streams that changed their replica, as all nodes count them."""
    streams = [node.get('/cluster', node.admin)['streams'] for node in nodes]
    return sum(s.get('rescued', 0) for s in streams), sum(sum(s['failovers'].values()) for s in streams)


def measure(nodes, way, clients, placement, bodies, references, args):
    slow = nodes[2]
    ports = {'round': [node.port for node in nodes], 'healthy': [nodes[0].port], 'slow': [slow.port]}[clients]
    load, watch = Load(ports, placement, bodies, references), Watch(slow, nodes[0])
    before = counted(nodes)
    threads = [threading.Thread(target=load.client) for _ in range(args.number)] + watch.threads
    for thread in threads:
        thread.start()
    victims = [WAYS[way](node.process) for node in (nodes if args.all else [slow])]
    begin = time.perf_counter()
    time.sleep(args.seconds)
    hurt = time.perf_counter()
    for victim in victims:
        victim.begin()
    try:
        time.sleep(args.seconds)
    finally:
        for victim in victims:
            victim.end()
    healed = time.perf_counter()
    time.sleep(args.rest)
    load.wanted = False
    watch.over.set()
    for thread in threads:
        thread.join()
    well, ill = load.times(begin, hurt - 0.5), load.times(hurt, healed)
    p95 = quantile(well, 0.95), quantile(ill, 0.95)
    moved = [after - then for after, then in zip(counted(nodes), before)]
    failed = sum(load.problems.values())
    print(f'| {way} | {clients} | {placement} | {len(well)} / {len(ill)} | {quantile(well, 0.5):.2f} / {p95[0]:.2f} '
          f'| {quantile(ill, 0.5):.2f} / {p95[1]:.2f} | {p95[1] / p95[0]:.1f} | {max(ill):.1f} '
          f'| {watch.after(hurt, "weight", lambda weight: weight < 0.2)} | {watch.after(hurt, "degraded", bool)} '
          f'| {watch.after(healed, "weight", lambda weight: weight > 0.9)} | {moved[0]} / {moved[1]} | {failed} |',
          *(f'{problem}: {count};' for problem, count in load.problems.most_common()), flush=True)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('binary')
    parser.add_argument('--ways', default='quota,stops')
    parser.add_argument('--clients', default='round,healthy,slow')
    parser.add_argument('--placements', default='balanced,random')
    parser.add_argument('--seconds', type=float, default=15, help='well, and as long slow')
    parser.add_argument('--rest', type=float, default=8, help='seconds after it was let go')
    parser.add_argument('--number', type=int, default=6, help='of clients')
    parser.add_argument('--tokens', type=int, default=48)
    parser.add_argument('--all', action='store_true', help='slow down all nodes')
    parser.add_argument('--keep-logs', metavar='FOLDER')
    parser.add_argument('--flags', default='', help='further flags of the nodes, in one string')
    args = parser.parse_args()
    bodies, failed = different_bodies(12, 12, args.tokens), 0
    with scratch(args.keep_logs) as folder:
        flags = model(folder, 'small') + args.flags.split()
        print('| way | clients at | placement | requests well / slow | s well p50 / p95 | s slow p50 / p95 | times | s slowest '
              '| s to weight < 0.2 | s to `degraded` | s to weight > 0.9 | rescued / failed over | failures |\n' + '|---' * 13 + '|', flush=True)
        for way in args.ways.split(','):
            for clients in args.clients.split(','):
                for placement in args.placements.split(','):
                    # A new cluster for each row: who has been slow a moment ago is trusted later.
                    nodes = cluster(args.binary, folder, 3, [flags] * 3)
                    for node in nodes:
                        node.wait(2)
                    references = [completion(nodes[0].port, body, 'balanced') for body in bodies]
                    failed += measure(nodes, way, clients, placement, bodies, references, args)
                    Node.end_all()
    sys.exit(failed > 0)


if __name__ == '__main__':
    main()
