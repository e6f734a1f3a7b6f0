# SPDX-License-Identifier: MIT
"""syntax.py BUILD [OTHER]: the compiler of BUILD reads all its sources, instantiates their templates and shows no error; warnings are
errors where BUILD has them so. It writes no object files, which takes half the time of compiling. What the same compiler has
compiled in OTHER, it leaves out."""
import concurrent.futures
import json
import os
import pathlib
import shlex
import subprocess
import sys


def check(command):
    words, kept = iter(shlex.split(command['command'])), []
    for word in words:
        if word in ('-o', '-MF', '-MQ'):
            next(words)
        elif word not in ('-c', '-MD'):
            kept.append(word)
    return subprocess.run([*kept, '-fsyntax-only'], cwd=command['directory'], capture_output=True, text=True)


def commands_of(build):
    return json.loads((pathlib.Path(build) / 'compile_commands.json').read_text())


def source_of(command):
    return (pathlib.Path(command['directory']) / command['file']).resolve()


def compiler_of(command):
    return next(word for word in shlex.split(command['command']) if pathlib.Path(word).name != 'ccache')


build, *others = sys.argv[1:]
done = {(source_of(command), compiler_of(command)) for other in others for command in commands_of(other)}
commands = [command for command in commands_of(build) if (source_of(command), compiler_of(command)) not in done]
failed = 0
with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for command, result in zip(commands, pool.map(check, commands)):
        if result.returncode != 0 or result.stderr:
            failed += result.returncode != 0
            print(f'{command["file"]}:\n{result.stdout}{result.stderr}', flush=True)
print(f'{len(commands)} sources, {failed} with errors')
sys.exit(failed > 0)
