#!/usr/bin/env python3
"""The cases of faults.sh, in an empty folder: faults.py kept|new [WORD].

kept: on the CPU device with cached kernels and autotuning results, so that images can be compared.
new: on the null device with empty caches, so that kernels are autotuned, where errors are most easily lost.
"""
import array
import json
import os
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request

KILN = os.environ["KILN"]
MAX_LINES, MAX_BYTES = 5, 1023
# Kernels that fail their test at the start are not used, with one line of log each. Images may then differ
# by MAX_DIFFERENCE.
NOT_USED = "a kernel of kiln's does not work on this device and is not used: "
MAX_DIFFERENCE = 1e-3
ARGS = ["--backend", "cuda", "--dtype", "f32"]
# Calls of the driver and the numbers of those that fail. A run may make fewer calls.
CALLS = {
    "cuInit": [1, 3],
    "cuDevicePrimaryCtxRetain": [1],
    "cuCtxSetCurrent": [1, 40, 300, 900, 1500],
    "cuStreamCreate": [1, 2],
    "cuEventCreate": [1, 10, 20, 40],
    "cuEventRecord": [2, 11, 30],
    "cuEventSynchronize": [1, 9, 21, 40],
    "cuMemAllocHost": [1],
    "cuMemcpyHtoDAsync": [1, 30, 200, 500],
    "cuMemcpy2DAsync": [1, 60, 120, 131],
    "cuModuleLoadData": [1, 20, 60],
    "cuModuleGetFunction": [2, 50],
    "cuFuncSetAttribute": [5, 300],
    "cuLaunchKernel": [1, 7, 150, 400, 600],
    "lost": [1, 30, 100, 400, 900, 1300],
}
SEVERAL = [
    "cuMemAllocAsync:1",
    "cuMemAllocAsync:1+",
    "cuMemAllocAsync:1+,cuMemAlloc:1+",
    "cuMemAllocAsync:2+,cuMemAlloc:1+",
    "cuMemAllocHost:1+",
    "cuLaunchKernel:200+",
]


def environment(cache, **more):
    return {**os.environ, "XDG_CACHE_HOME": os.path.abspath(cache), **more}


def generate(cache, **failing):
    """Returns exit code, stderr, and the values of the image if there is one."""
    for name in ["out.png", "dump"]:
        if os.path.exists(name):
            os.remove(name)
    command = [KILN, "generate", "a red circle", "--steps", "2", "--seed", "1", "--dump", "dump", "--quiet", *ARGS]
    ran = subprocess.run(command, env=environment(cache, **failing), capture_output=True, text=True, timeout=900)
    said = "".join(line for line in ran.stderr.splitlines(True) if not line.startswith("cuda-sim: "))
    return ran.returncode, said, values("dump") if os.path.exists("out.png") else None


def values(dump):
    """The values of `image_float` in a safetensors file."""
    file = open(dump, "rb").read()
    start = 8 + struct.unpack("<Q", file[:8])[0]
    first, end = json.loads(file[8:start])["image_float"]["data_offsets"]
    return array.array("f", file[start + first : start + end])


def check(ran, undisturbed):
    code, said, picture = ran
    not_used = [line for line in said.splitlines(True) if line.startswith(NOT_USED)]
    said = "".join(line for line in said.splitlines(True) if not line.startswith(NOT_USED))
    if code == 0:
        assert said == "", said[:2000]
        if not_used:
            largest = max(abs(x - y) for x, y in zip(picture, undisturbed, strict=True))
            assert largest <= MAX_DIFFERENCE, f"the picture is off by {largest}"
            return f"{len(not_used)} kernels not used, off by {largest:.1e}"
        assert picture == undisturbed, "the picture is another one"
        return "harmless"
    assert code == 1, f"exit code {code}: {said}"
    assert picture is None, "a picture was written"
    assert said.startswith("error: "), said[:2000]
    assert len(said.splitlines()) <= MAX_LINES and len(said.encode()) <= MAX_BYTES, said[:2000]
    return said.strip()


def kept():
    code, said, _ = generate("kept")
    assert code == 0, said
    code, said, undisturbed = generate("kept")
    assert (code, said) == (0, ""), said
    cases = [f"{call}:{number}" for call, numbers in CALLS.items() for number in numbers] + SEVERAL
    for case in cases:
        yield case, lambda case=case: check(generate("kept", SIM_FAIL=case), undisturbed)
    for failing in ["cuLaunchKernel:300", "cuMemcpyHtoDAsync:200", "cuEventRecord:4", "cuCtxSetCurrent:500"]:
        yield f"serve {failing}", lambda failing=failing: serve(failing, False)
    yield "serve lost:200", lambda: serve("lost:200", True)


def new():
    for kernel, is_own in [("rms_norm", True), ("attention_f", True), ("elemwise_fuse", False), ("copy_kernel", False)]:
        yield f"{kernel} does not compile", lambda: uncompiled(f"new-{kernel}", kernel, is_own)


def uncompiled(cache, kernel, is_own):
    """kiln tests its own kernels at the start, and uses burn's if they fail."""
    ran = generate(cache, SIM_NVRTC_FAIL=kernel)
    if ran[0] == 0 and is_own:
        return "not used"
    assert ran[0] != 0, "an image was generated without the kernel"
    said = check(ran, None)
    assert "does not compile" in said, said
    # Again, with cached autotuning results.
    assert "does not compile" in check(generate(cache, SIM_NVRTC_FAIL=kernel), None)
    return said


def answer(url, body=None):
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as got:
            return got.status, json.loads(got.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def image_of(body):
    return body["data"][0]["b64_json"]


def serve(failing, is_lost):
    """Generates an image, fails, and generates the same image again if the device is not lost."""
    with open("log", "w") as log:
        command = [KILN, "serve", "--port", "0", "--no-warm-up", *ARGS]
        server = subprocess.Popen(command, env=environment("kept", SIM_FAIL_FILE="failing"), stderr=log)
    try:
        url = None
        while url is None:
            assert server.poll() is None, open("log").read()
            listening = [line for line in open("log") if "listening on" in line]
            url = listening[0].split("listening on ")[1].strip() if listening else time.sleep(0.05)
        while answer(f"{url}/health/ready")[0] != 200:
            assert server.poll() is None, open("log").read()
            time.sleep(0.05)
        body = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1, "size": "128x128"}
        generate_image = lambda: answer(f"{url}/v1/images/generations", body)
        status, first = generate_image()
        assert status == 200, first
        with open("failing.new", "w") as file:
            file.write(failing)
        os.rename("failing.new", "failing")
        status, failed = generate_image()
        assert status == 500 or not is_lost and image_of(failed) == image_of(first), failed
        ready, health = answer(f"{url}/health/ready")
        if is_lost:
            os.remove("failing")
            assert (ready, health["status"]) == (503, "failed") and health["reason"], health
            assert generate_image()[0] == 503
        else:
            assert ready == 200, health
            os.remove("failing")
            status, again = generate_image()
            assert status == 200, again
            assert image_of(again) == image_of(first), "the image differs"
        said = [line for line in open("log") if "ERROR" in line or "WARN" in line]
        assert len(said) <= MAX_LINES and all(len(line) <= MAX_BYTES for line in said), said
        return "".join(said).strip()
    finally:
        if os.path.exists("failing"):
            os.remove("failing")
        server.terminate()
        server.wait(60)


def main():
    word = sys.argv[2] if len(sys.argv) > 2 else ""
    bad = 0
    for name, case in {"kept": kept, "new": new}[sys.argv[1]]():
        if word not in name:
            continue
        try:
            print(f"ok   {name}: {case()}", flush=True)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            bad += 1
            print(f"BAD  {name}: {error}", flush=True)
    sys.exit(bad > 0)


main()
