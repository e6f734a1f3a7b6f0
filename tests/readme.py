# SPDX-License-Identifier: MIT
"""Checks README.md, docs/ and the other pages: their C++ snippets are cut from the examples, and what they link to is there.
--write puts the snippets there.

A snippet stands below a comment `<!-- examples/NAME.cpp [tag] -->`; in the example it stands between two lines `// [tag]`."""
import pathlib
import re
import sys
import textwrap

root = pathlib.Path(__file__).resolve().parent.parent
pages = [root / 'README.md', root / 'CONTRIBUTING.md', root / 'tests/cuda/README.md', *sorted(root.glob('docs/*.md')), *sorted(root.glob('*/README.md'))]
marker = re.compile(r'<!-- (examples/\S+) \[(\w+)\] -->\n```cpp\n(.*?)```', re.S)
link = re.compile(r'\]\(([^)\s]+)\)')


def snippet(path, tag):
    parts = re.split(rf'^[ ]*// \[{tag}\]\n', (root / path).read_text(), flags=re.M)
    if len(parts) != 3:
        sys.exit(f'{path} must have two lines `// [{tag}]`')
    return textwrap.dedent(parts[1])


def anchors(page):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.+)$', re.sub(r'```.*?```', '', page.read_text(), flags=re.S), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def broken_links(page):
    for target in link.findall(re.sub(r'```.*?```|`[^`\n]*`', '', page.read_text(), flags=re.S)):
        if re.match(r'https?:', target):
            continue
        name, _, anchor = target.partition('#')
        to = page.parent / name if name else page
        if not to.exists() or anchor and to.suffix == '.md' and anchor not in anchors(to):
            yield f'{page.relative_to(root)} links to {target}, which is not there'


count = 0
wrong = []
for page in pages:
    text = page.read_text()
    count += len(marker.findall(text))
    updated = marker.sub(lambda m: f'<!-- {m[1]} [{m[2]}] -->\n```cpp\n{snippet(m[1], m[2])}```', text)
    if '--write' in sys.argv:
        page.write_text(updated)
    elif updated != text:
        wrong.append(f'{page.relative_to(root)} and the examples differ: run python3 tests/readme.py --write')
    wrong += broken_links(page)
if count == 0:
    wrong.append('no page has a snippet of an example')
if wrong:
    sys.exit('\n'.join(wrong))
