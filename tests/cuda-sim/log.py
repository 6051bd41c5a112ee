#!/usr/bin/env python3
"""Summarises a log of the driver (SIM_LOG): calls by kind, launches by kernel and shape, copies by size.

    log.py LOG.csv                  the whole log
    log.py LONG.csv SHORT.csv N     one step, where LONG ran N steps more than SHORT
"""
import collections
import csv
import sys


def read(path):
    kinds, sizes, kernels, copies = (collections.Counter() for _ in range(4))
    with open(path) as f:
        for row in csv.DictReader(f):
            kinds[row["kind"]] += 1
            sizes[row["kind"]] += int(row["bytes"] or 0)
            if row["kind"] == "launch":
                shape = lambda a: "x".join(row[a + axis] for axis in "xyz")
                kernels[f"{row['name'][:70]:70} grid {shape('g')} block {shape('b')} shared {row['shared']}"] += 1
            if row["kind"] in ("htod", "dtoh", "dtod"):
                copies[f"{row['kind']} of {row['bytes']} bytes"] += 1
    return kinds, sizes, kernels, copies


def main():
    counts, steps = read(sys.argv[1]), 1
    if len(sys.argv) == 4:
        steps = float(sys.argv[3])
        for long, short in zip(counts, read(sys.argv[2])):
            long.subtract(short)
    kinds, sizes, kernels, copies = counts
    for kind, n in kinds.most_common():
        if n:
            print(f"{n / steps:10.1f} {kind:12} {sizes[kind] / steps / 2**20:12.3f} MiB")
    for title, table in (("launches", kernels), ("copies", copies)):
        print(f"-- {title}")
        for text, n in table.most_common(60):
            if n:
                print(f"{n / steps:10.1f} {text}")


if __name__ == "__main__":
    main()
