#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Tables and curves of the routing experiment.

usage: report.py CSV... [--page PAGE.md] [--svg CURVES.svg]

Prints a Markdown table for each form of the experiment and each task. With --page, puts the tables into that page,
between its lines <!-- results --> and <!-- /results -->.
"""
import argparse
import collections
import csv
import math
import statistics

ARMS = ['learned', 'static', 'random', 'frozen', 'position', 'default', 'light', 'dense']
COLORS = ['#d62728', '#1f77b4', '#2ca02c', '#9467bd', '#ff7f0e', '#8c564b', '#7f7f7f', '#000000']
TASKS = {'denoise': 'masked denoising', 'language': 'causal language model', 'retrieve': 'retrieval'}
# 97.5 % quantiles of Student's t
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values):
    """Mean, and half the width of its 95 % confidence interval; None from a single value."""
    if len(values) < 2:
        return statistics.fmean(values), None
    quantile = T.get(len(values) - 1, 1.96)
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def text(mean_and_half, digits=3, sign=''):
    mean, half = mean_and_half
    return f'{mean:{sign}.{digits}f}'.replace('-', '−') + ('' if half is None else f' ± {half:.{digits}f}')


def read(files):
    """{(dim, length, steps): {task: {arm: {seed: [row...]}}}}, rows in the order of the steps."""
    forms = collections.defaultdict(lambda: collections.defaultdict(lambda: collections.defaultdict(dict)))
    for name in files:
        with open(name, newline='') as file:
            for row in csv.DictReader(file):
                form = tuple(int(row[key]) for key in ('dim', 'length', 'planned_steps'))
                arms = forms[form][row['task']][row['arm']]
                arms.setdefault(row['seed'], []).append({key: float(value) for key, value in row.items()
                                                         if key not in ('task', 'arm')})
    return forms


def table(form, task, arms):
    dim, length, _ = form
    last = {arm: {seed: rows[-1] for seed, rows in seeds.items()} for arm, seeds in arms.items()}
    rows = [f'**{TASKS[task].capitalize()}**, {length} bytes, dimension {dim}, '
            f'{max(len(seeds) for seeds in arms.values())} seeds', '',
            '| arm | multiplications per byte | bits per predicted byte | more than learned | right | router gradient |',
            '|---|--:|--:|--:|--:|--:|']
    for arm in ARMS:
        if arm not in last:
            continue
        runs = last[arm]
        difference = ''
        if arm != 'learned' and 'learned' in last:
            paired = [run['bits'] - last['learned'][seed]['bits'] for seed, run in runs.items() if seed in last['learned']]
            if paired:
                difference = text(interval(paired), sign='+')
        gradients = [row['router_gradient'] for rows in arms[arm].values() for row in rows]
        gradient = statistics.fmean(gradients)
        rows.append(f"| {arm} | {statistics.fmean(run['operations_per_token'] for run in runs.values()):,.0f} | "
                    f"{text(interval([run['bits'] for run in runs.values()]))} | {difference} | "
                    f"{100 * statistics.fmean(run['accuracy'] for run in runs.values()):.1f} % | "
                    f"{'0' if gradient == 0 else format(gradient, '.2g')} |")
    return '\n'.join(rows)


def curves(arms):
    """{arm: [(operations, mean of bits, half interval)...]}, without the end, which is measured on more text."""
    result = {}
    for arm in ARMS:
        points = list(zip(*arms.get(arm, {}).values()))[:-1]
        result[arm] = [(rows[0]['operations'], *interval([row['bits'] for row in rows])) for rows in points]
    return {arm: points for arm, points in result.items() if points}


def panel(title, arms, left, top, width, height):
    lines = curves(arms)
    most = max(points[-1][0] for points in lines.values())
    # The first tenths fall steeply, and they and the dense arm would flatten the rest.
    seen = [point[1] for arm, points in lines.items() for point in points if point[0] >= 0.25 * most and arm != 'dense']
    low, high = min(seen), max(seen)
    low, high = max(0, low - 0.05 * (high - low) - 1e-3), high + 0.05 * (high - low) + 1e-3
    x = lambda operations: left + width * operations / most
    y = lambda bits: top + height * (high - min(max(bits, low), high)) / (high - low)
    out = [f'<text x="{left + width / 2:.0f}" y="{top - 8}" text-anchor="middle" font-weight="bold">{title}</text>',
           f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#888"/>',
           f'<text x="{left + width}" y="{top + height + 14}" text-anchor="end">{most:.2g} multiplications</text>',
           f'<text x="{left}" y="{top + height + 14}">0</text>']
    for i in range(5):
        bits = low + (high - low) * i / 4
        out.append(f'<text x="{left - 4}" y="{y(bits) + 4:.1f}" text-anchor="end">{bits:.2f}</text>')
        out.append(f'<path d="M{left} {y(bits):.1f}h{width}" stroke="#ddd" fill="none"/>')
    for arm, points in lines.items():
        color = COLORS[ARMS.index(arm)]
        if len(points) > 1 and points[0][2] is not None:
            edge = [f'{x(o):.1f},{y(m + h):.1f}' for o, m, h in points]
            edge += [f'{x(o):.1f},{y(m - h):.1f}' for o, m, h in reversed(points)]
            out.append(f'<polygon points="{" ".join(edge)}" fill="{color}" opacity="0.12"/>')
        path = ' '.join(f'{x(o):.1f},{y(m):.1f}' for o, m, _ in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
    return out


def draw(forms):
    width, height, gap = 270, 210, 62
    columns = max(len(tasks) for tasks in forms.values())
    total_width, total_height = columns * (width + gap) + 20, len(forms) * (height + gap) + 40
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} {total_height}" '
           'font-family="sans-serif" font-size="11">', '<rect width="100%" height="100%" fill="white"/>']
    for row, (form, tasks) in enumerate(sorted(forms.items())):
        for column, task in enumerate(task for task in TASKS if task in tasks):
            out += panel(f'{TASKS[task]}, {form[1]} bytes', tasks[task], 50 + column * (width + gap),
                         30 + row * (height + gap), width, height)
    for i, arm in enumerate(ARMS):
        at = 50 + i * 90
        out.append(f'<path d="M{at} {total_height - 14}h18" stroke="{COLORS[i]}" stroke-width="3"/>')
        out.append(f'<text x="{at + 22}" y="{total_height - 10}">{arm}</text>')
    return '\n'.join(out + ['</svg>', ''])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('csv', nargs='+')
    parser.add_argument('--page')
    parser.add_argument('--svg')
    options = parser.parse_args()
    forms = read(options.csv)
    tables = '\n\n'.join(table(form, task, tasks[task]) for form, tasks in sorted(forms.items())
                         for task in TASKS if task in tasks)
    print(tables)
    if options.svg:
        with open(options.svg, 'w') as file:
            file.write(draw(forms))
    if options.page:
        with open(options.page) as file:
            page = file.read()
        before, rest = page.split('<!-- results -->\n')
        after = rest.split('<!-- /results -->')[1]
        with open(options.page, 'w') as file:
            file.write(f'{before}<!-- results -->\n{tables}\n<!-- /results -->{after}')


if __name__ == '__main__':
    main()
