# SPDX-License-Identifier: MIT
"""summary.py TESTLOG_JSON...: adds up what `meson test` ran, one count per doctest case or line of the Test Anything Protocol.

The last line is `N passed, N failed`; the exit status is 1 when something failed or nothing ran. A log that does not exist is of
a build without tests of the suites that were asked for.
"""
import json
import pathlib
import re
import sys

DOCTEST = re.compile(r'^\[doctest\] test cases: +\d+ \| +(\d+) passed \| +(\d+) failed', re.MULTILINE)
TAP = re.compile(r'^(not )?ok\b', re.MULTILINE)


def count(test):
    """(passed, failed) of one Meson test."""
    output = test.get('stdout', '')
    good = test['result'] in ('OK', 'EXPECTEDFAIL')
    if summary := re.search(DOCTEST, output):
        passed, failed = int(summary[1]), int(summary[2])
    elif lines := TAP.findall(output):
        passed, failed = lines.count(''), lines.count('not ')
    else:
        passed, failed = int(good), 0
    # A program that crashed, was stopped or found a leak has failed, whatever it counted.
    return passed, max(failed, 0 if good else 1)


passed = failed = 0
for path in map(pathlib.Path, sys.argv[1:]):
    tests = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not tests:
        print(f'nothing was tested in {path.parts[0]}')
    for test in tests:
        if test['result'] == 'SKIP':
            print(f'skipped: {test["name"]}')
            continue
        more_passed, more_failed = count(test)
        passed, failed = passed + more_passed, failed + more_failed
        if more_failed:
            print(f'failed: {test["name"]}, {test["result"]} ({path})')
print(f'{passed} passed, {failed} failed')
sys.exit(failed > 0 or passed == 0)
