# SPDX-License-Identifier: MIT
"""MkDocs calls these functions (see mkdocs.yml). They add to docs/ the pages that are elsewhere in the repository, a page for each
example, and the API reference, which is cut from the `///` comments of the headers; and they turn links into the repository,
as the pages have them, into links to those pages."""
import os
import pathlib
import re
import textwrap

from mkdocs.structure.files import File

root = pathlib.Path(__file__).resolve().parent.parent
include = root / 'include' / 'colt5'

pages = {'README.md': 'index.md', 'CONTRIBUTING.md': 'contributing.md', 'CHANGELOG.md': 'changelog.md', 'python/README.md': 'python.md',
         'examples/README.md': 'examples.md', 'bench/README.md': 'bench.md', 'tests/cuda/README.md': 'cuda-tests.md'}
folders = {
    'module': 'Modules: parameters, forward and backward. `config.hpp` has the fields of every configuration.',
    'router': 'Routers: which tokens the heavy branch gets, and with what scores.',
    'op': 'Operations: pure functions of tensors, each with its vector-Jacobian product.',
    'expr': 'Expressions: elementwise functions and reductions of rows, evaluated in one pass.',
    'optim': 'Optimizer, clipping of gradients, learning-rate schedules.',
    'io': 'Files: safetensors, NumPy, HTML pages; tensors of other libraries by DLPack.',
    'core': 'Tensors, views, policies, random numbers, errors.',
    'schedule': 'In which order modules run operations: for developers.',
    'cpu': 'The backend for the CPU. Kernels are documented with their operations in `op`.',
    'cuda': 'The backend for NVIDIA GPUs. Kernels are documented with their operations in `op`.',
}


def declaration(lines, at):
    """The code that a comment before line `at` documents, and whether it is a type: up to its body, or with it if it is data."""
    code, depth = [], 0
    for line in lines[at:]:
        code.append(line)
        bare = re.sub(r'//.*|"[^"]*"', '', line)
        depth += bare.count('(') - bare.count(')')
        if depth <= 0 and re.search(r'[{;]\s*$', bare) or re.search(r'\{.*\}\s*;?\s*$', bare):
            break
    text = textwrap.dedent('\n'.join(code))
    is_type = re.search(r'^(?:template.*|requires.*|\s)*(?:struct|class|enum class|concept|union)\b', text, re.M)
    if is_type and text.rstrip().endswith('{'):
        body = []
        indent = re.match(r' *', lines[at])[0]
        for line in lines[at + len(code):]:
            body.append(line)
            if line.startswith(indent + '}'):
                break
        whole = textwrap.dedent('\n'.join(code + body))
        if len(body) <= 90 and not re.search(r'\b(return|if \(|for \(|static_assert)', whole):
            return whole, True
    text = re.sub(r'\)\s*:\s[^:].*', ')', text, flags=re.S) if 'operator' not in text and not is_type else text  # initializers
    return re.sub(r'\s*(\{[^{}]*\}?)?\s*$', '', text) if not text.rstrip().endswith(';') else text.strip(), bool(is_type)


def entries(path):
    """(comment, declaration, whether it is inside of a class) of what is public in a header"""
    lines, hidden, private, i = path.read_text().splitlines(), None, None, 0
    while i < len(lines):
        line = lines[i]
        indent = len(line) - len(line.lstrip())
        if hidden is None and re.match(r'namespace (detail|colt5::detail|cpu|cuda|colt5::cuda|colt5::cpu)\b', line):
            hidden = re.sub(r'namespace (.*?) \{.*', r'}  // namespace \1', line)
        if hidden is not None and line.startswith(hidden):
            hidden = None
        if re.match(r'\s*private:', line):
            private = indent
        if private is not None and re.match(r'\s*(\}|public:)', line) and indent <= private:
            private = None
        if line.lstrip().startswith('/// ') or line.strip() == '///':
            comment = []
            while i < len(lines) and re.match(r'\s*///(?!<)', lines[i]):
                comment.append(re.sub(r'^\s*/// ?', '', lines[i]))
                i += 1
            if hidden is None and private is None and i < len(lines):
                if not lines[i].strip() or lines[i].startswith(('namespace', '#')):
                    yield '\n'.join(comment), None, False
                else:
                    code, _ = declaration(lines, i)
                    yield '\n'.join(comment), code, indent > 0
            continue
        if hidden is None and re.match(r'(struct|class|enum class) \w+.*\{$', line) and not (i and lines[i - 1].startswith(('///', 'template', 'requires'))):
            yield '', declaration(lines, i)[0], False
        i += 1


def name_of(code):
    code = re.sub(r'^template <.*?>\n', '', code, flags=re.S)
    code = re.sub(r'\brequires\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|^requires[^\n]*\n', '', code)
    for pattern in (r'(?:struct|class|enum class|concept|union)\s+(\w+)', r'using (\w+) =', r'(operator\S+?)\s*\(', r'([~\w]+)\s*\(',
                    r'(\w+)\s*(?:=|\{|;|$)'):
        if found := re.search(pattern, code):
            return found[1]
    return code.split()[0]


def reference(folder):
    text = [f'# {folder}/\n', folders[folder], '']
    for path in sorted((include / folder).glob('*.[hc]*')):
        if path.suffix == '.inc' or path.stem == 'declared' or folder in ('cpu', 'cuda') and path.stem not in ('policy', 'eigen', 'blas'):
            continue
        found = list(entries(path))
        if not found:
            continue
        text += [f'## {path.name} {{ #{path.stem} }}', '', f'`#include <{path.relative_to(include.parent)}>`', '']
        for comment, code, is_member in found:
            if code:
                text += [f'#### `{name_of(code)}`' if is_member else f'### `{name_of(code)}`', '', '```cpp', code, '```', '']
            text += [comment, '']
    return '\n'.join(text)


def example(path):
    return f'# {path.stem}\n\n`{path.relative_to(root)}`\n\n```cpp\n{path.read_text()}```\n'


examples = {path.relative_to(root): f'examples/{"-".join(path.relative_to(root / "examples").with_suffix("").parts)}{"-cu" * (path.suffix == ".cu")}.md' for path in sorted(root.glob('examples/**/*.c*')) if path.suffix in ('.cpp', '.cu')}


def on_files(files, config):
    for source, page in pages.items():
        files.append(File.generated(config, page, content=(root / source).read_text()))
    for source, page in examples.items():
        files.append(File.generated(config, page, content=example(root / source)))
    for folder in folders:
        files.append(File.generated(config, f'api/{folder}.md', content=reference(folder)))
    return files


def page_of(target):
    """Where a file or folder of the repository is in the site, or None."""
    if str(target) in pages:
        return pages[str(target)]
    if target in examples:
        return examples[target]
    parts = target.parts
    if parts[:1] == ('docs',):
        return '/'.join(parts[1:])
    if parts[:2] == ('include', 'colt5') and len(parts) > 2 and parts[2] in folders:
        stem = target.stem if len(parts) > 3 else ''
        shown = stem and (parts[2] not in ('cpu', 'cuda') or stem in ('policy', 'eigen', 'blas'))
        return f'api/{parts[2]}.md' + (f'#{stem}' if shown else '')
    if parts[:1] == ('examples',) and len(parts) > 1:
        return 'examples.md'
    return None


def on_page_markdown(markdown, page, config, files):
    at = page.file.src_uri
    home = next((source for source, to in pages.items() if to == at), f'docs/{at}')

    def link(match):
        text, target = match[1], match[2]
        if re.match(r'https?:|#', target):
            return match[0]
        name, _, anchor = target.partition('#')
        to = pathlib.Path(os.path.normpath(os.path.join(os.path.dirname(home), name)))
        found = page_of(to)
        if found is None:
            return f'{text} (`{to}` of the repository)'
        if anchor:
            found = found.partition('#')[0] + '#' + anchor
        return f'[{text}]({os.path.relpath(found.partition("#")[0], os.path.dirname(at) or ".")}{"#" + found.partition("#")[2] if "#" in found else ""})'

    if at.startswith(('api/', 'examples/')):
        return markdown
    return re.sub(r'\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)\s]+)\)', link, markdown)
