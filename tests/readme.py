# SPDX-License-Identifier: MIT
"""The C++ snippets of README.md are cut from the examples: checks that they still are, or with --write puts them there.

A snippet stands below a comment `<!-- examples/NAME.cpp [tag] -->`; in the example it stands between two lines `// [tag]`."""
import pathlib
import re
import sys
import textwrap

root = pathlib.Path(__file__).resolve().parent.parent
readme = root / 'README.md'
marker = re.compile(r'<!-- (examples/\S+) \[(\w+)\] -->\n```cpp\n(.*?)```', re.S)


def snippet(path, tag):
    parts = re.split(rf'^[ ]*// \[{tag}\]\n', (root / path).read_text(), flags=re.M)
    if len(parts) != 3:
        sys.exit(f'{path} must have two lines `// [{tag}]`')
    return textwrap.dedent(parts[1])


text = readme.read_text()
count = len(marker.findall(text))
updated = marker.sub(lambda m: f'<!-- {m[1]} [{m[2]}] -->\n```cpp\n{snippet(m[1], m[2])}```', text)
if '--write' in sys.argv:
    readme.write_text(updated)
elif count == 0 or updated != text:
    sys.exit('README.md and the examples differ: run python3 tests/readme.py --write')
