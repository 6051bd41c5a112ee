"""Runs the Python and TypeScript of docs/clients.md and the commands of docs/jobs.md with a running `kiln serve` with the demo model.

Usage: python test_docs.py URL KEY NODE_FOLDER

NODE_FOLDER has the packages of package.json; `node` runs TypeScript directly, `tsc` checks its types.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

server, key, node_folder = sys.argv[1:]
page = Path(__file__).parents[2] / "docs" / "clients.md"
folder = Path(node_folder)
image = folder / "circle.png"
compiler = ["node_modules/.bin/tsc", "--noEmit", "--strict", "--module", "nodenext"]
compiler += ["--target", "es2023", "--skipLibCheck"]


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


for language, file, commands in [
    ("python", "clients.py", [[sys.executable, "clients.py"]]),
    ("typescript", "clients.ts", [[*compiler, "clients.ts"], ["node", "clients.ts"]]),
]:
    started = time.monotonic()
    [code] = re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for placeholder, value in [("http://127.0.0.1:8091", server), ('"none"', f'"{key}"')]:
        assert code.count(placeholder) == 1, placeholder
        code = code.replace(placeholder, value)
    (folder / file).write_text(code, "utf-8")
    image.unlink(missing_ok=True)
    output = [run(*command) for command in commands][-1]
    assert image.read_bytes().startswith(b"\x89PNG"), "no image"
    assert output.startswith("data:image/png;base64,"), output
    print(f"docs/clients.md: {language} ok ({time.monotonic() - started:.1f} s)")

# The commands of docs/jobs.md, in their order. They leave job.json and circle.png.
text = (Path(__file__).parents[2] / "docs" / "jobs.md").read_text("utf-8")
blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
code = "".join(block for block in blocks if "curl" in block)
assert code.count("http://127.0.0.1:8091") == 1
code = code.replace("http://127.0.0.1:8091", server).replace("curl ", f"curl -f -H 'Authorization: Bearer {key}' ")
image.unlink(missing_ok=True)
output = run("bash", "-euo", "pipefail", "-c", code)
assert json.loads((folder / "job.json").read_text("utf-8"))["object"] == "image.job"
assert image.read_bytes().startswith(b"\x89PNG"), "no image"
assert '"status": "completed"' in output and "event: status" in output, output
assert json.loads(output[output.rindex("{"):])["deleted"] is True, output
print("docs/jobs.md: commands ok")
