"""Runs the README's Python and TypeScript with a running `kiln serve` with the demo model.

Usage: python test_readme.py URL KEY NODE_FOLDER

NODE_FOLDER has the packages of package.json; `node` runs TypeScript directly, `tsc` checks its types.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

server, key, node_folder = sys.argv[1:]
readme = Path(__file__).parents[2] / "README.md"
folder = Path(node_folder)
image = folder / "circle.png"
compiler = ["node_modules/.bin/tsc", "--noEmit", "--strict", "--module", "nodenext"]
compiler += ["--target", "es2023", "--skipLibCheck"]


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


for language, file, commands in [
    ("python", "readme.py", [[sys.executable, "readme.py"]]),
    ("typescript", "readme.ts", [[*compiler, "readme.ts"], ["node", "readme.ts"]]),
]:
    started = time.monotonic()
    [code] = re.findall(rf"^```{language}\n(.*?)^```", readme.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for placeholder, value in [("http://127.0.0.1:8091", server), ('"none"', f'"{key}"')]:
        assert code.count(placeholder) == 1, placeholder
        code = code.replace(placeholder, value)
    (folder / file).write_text(code, "utf-8")
    image.unlink(missing_ok=True)
    output = [run(*command) for command in commands][-1]
    assert image.read_bytes().startswith(b"\x89PNG"), "no image"
    assert output.startswith("data:image/png;base64,"), output
    print(f"README: {language} ok ({time.monotonic() - started:.1f} s)")
