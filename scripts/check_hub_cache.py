#!/usr/bin/env python3
"""Holds jedi's use of the hub's cache to Python's huggingface_hub: each reads what the other downloaded, and goes on with what
the other began. Serves the model inside the program from a hub on the loopback; nothing leaves the machine.

    cargo build --release && venv/bin/pip install huggingface_hub==0.36.2 && venv/bin/python scripts/check_hub_cache.py target/release/jedi
"""

import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = ROOT / "configs/toybox/model"
NAME, COMMIT = "someone/toybox", "0123456789abcdef0123456789abcdef01234567"
FILES = {str(path.relative_to(MODEL)): path.read_bytes() for path in MODEL.rglob("*") if path.is_file()}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
# Ranges that the hub was asked for.
ranges = []


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, has_body):
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": name} for name in FILES]
            info = {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            return self.send(200, {"Content-Type": "application/json"}, json.dumps(info).encode(), has_body)
        name = path.removeprefix(f"/{NAME}/resolve/").partition("/")[2]
        if name not in FILES:
            return self.send(404, {"X-Error-Code": "EntryNotFound"}, b"", has_body)
        contents, etag = FILES[name], etag_of(name)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        wanted = self.headers.get("Range")
        if wanted:
            first = int(wanted.removeprefix("bytes=").split("-")[0])
            ranges.append(first)
            headers["Content-Range"] = f"bytes {first}-{len(contents) - 1}/{len(contents)}"
            return self.send(206, headers, contents[first:], has_body)
        self.send(200, headers, contents, has_body)

    def send(self, status, headers, body, has_body):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if has_body:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def etag_of(name):
    contents = FILES[name]
    if name.endswith(".safetensors"):
        return hashlib.sha256(contents).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()


def main():
    jedi = sys.argv[1]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"

    def run_jedi(home, *, offline):
        environment = {**os.environ, "HF_HOME": home, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "1" if offline else "0"}
        picture = pathlib.Path(home) / "picture.png"
        command = [jedi, "sample", "--model", NAME, "--prompt", "a robot", "--steps", "2", "--out", picture]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        assert picture.stat().st_size > 0

    def run_python(home, program):
        environment = {**os.environ, "HF_HOME": home, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True)

    def unfinished(home, n_bytes):
        blobs = pathlib.Path(home) / "hub/models--someone--toybox/blobs"
        blobs.mkdir(parents=True)
        (blobs / f"{etag_of(WEIGHTS)}.incomplete").write_bytes(FILES[WEIGHTS][:n_bytes])

    whole = f"""
import huggingface_hub, pathlib
folder = pathlib.Path(huggingface_hub.snapshot_download("{NAME}", local_files_only=True))
assert folder.name == "{COMMIT}", folder
for name in {sorted(FILES)}:
    assert (folder / name).read_bytes() == (pathlib.Path({str(MODEL)!r}) / name).read_bytes(), name
cached = huggingface_hub.scan_cache_dir()
assert not cached.warnings, cached.warnings
[repo] = cached.repos
[revision] = repo.revisions
assert (repo.repo_id, set(revision.refs), len(revision.files)) == ("{NAME}", {{"main"}}, {len(FILES)}), repo
"""
    with tempfile.TemporaryDirectory() as home:
        unfinished(home, 4000)
        run_jedi(home, offline=False)
        assert ranges == [4000], ranges
        run_python(home, whole)
        print("what jedi downloads, Python has")
    with tempfile.TemporaryDirectory() as home:
        run_python(home, f"import huggingface_hub; huggingface_hub.snapshot_download('{NAME}')")
        run_jedi(home, offline=True)
        print("what Python downloads, jedi has")
    with tempfile.TemporaryDirectory() as home:
        ranges.clear()
        unfinished(home, 5000)
        run_python(home, f"import huggingface_hub; huggingface_hub.hf_hub_download('{NAME}', '{WEIGHTS}')")
        assert ranges == [5000], ranges
        run_jedi(home, offline=False)
        print("what one begins, the other goes on with")


if __name__ == "__main__":
    main()
