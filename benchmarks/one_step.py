"""One-step training by rlamort beside a loop written by hand: the same problem, network, optimiser and batch, in turns.

    python benchmarks/one_step.py [--rounds 5] [--updates 1000] [--threads 2]

Prints updates per second of each round, and the median ratio. Run it on an idle machine.
"""

import argparse
import json
import statistics
import time

import torch
from torch import nn

import rlamort as ra
from rlamort.run.learner import learner_class

BATCH, HIDDEN = 256, (128, 128)


class Portfolio(ra.Problem):
    domain = ra.Simplex(20)
    convex = True

    def contexts(self, count):
        return torch.randn(count, 20)

    def cost(self, y, x):
        return -(x * y).sum(-1) + 0.5 * y.square().sum(-1)


def by_hand(updates, network, optimiser):
    """What a user of plain PyTorch would write."""
    for _ in range(updates):
        x = torch.randn(BATCH, 20)
        y = network(x).softmax(-1)
        loss = (-(x * y).sum(-1) + 0.5 * y.square().sum(-1)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def rate(call, updates):
    started = time.perf_counter()
    call(updates)
    return updates / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=1_000)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    network = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 20))
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    learner = learner_class("amortize")(Portfolio, hidden=HIDDEN, batch_size=BATCH, threads=given.threads, compile=False)
    contenders = {
        "rlamort": lambda updates: learner.learn(updates, reset_num_timesteps=False),
        "by hand": lambda updates: by_hand(updates, network, optimiser),
    }
    for call in contenders.values():
        call(100)
    ratios = []
    for _ in range(given.rounds):
        rates = {name: rate(call, given.updates) for name, call in contenders.items()}
        ratios.append(rates["rlamort"] / rates["by hand"])
        print(json.dumps({name: round(value, 1) for name, value in rates.items()}), flush=True)
    print(f"rlamort / by hand = {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
