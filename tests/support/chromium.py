"""A page in headless Chromium, asked by its debugging port: for pages that go on after loading."""

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest


def evaluate(url: str, expression: str, folder: Path, seconds: float = 20.0) -> object:
    """The value of a JavaScript expression on a page, as soon as it is neither null nor ""."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("Chromium is not installed")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}",
               "--remote-debugging-port=0", "--remote-allow-origins=*", url]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end, port_file = time.monotonic() + seconds, folder / "DevToolsActivePort"
    try:
        while not (port_file.is_file() and port_file.read_text().count("\n")):
            if process.poll() is not None or time.monotonic() > end:
                pytest.skip("Chromium does not run here")
            time.sleep(0.05)
        port = int(port_file.read_text().split()[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as reply:
            [path] = [target["webSocketDebuggerUrl"].partition(str(port))[2]
                      for target in json.load(reply) if target["type"] == "page"]  # fmt: skip
        with socket.create_connection(("127.0.0.1", port), timeout=seconds) as client:
            key = base64.b64encode(os.urandom(16)).decode()
            client.sendall((f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket"
                            f"\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
                            "Sec-WebSocket-Version: 13\r\n\r\n").encode())  # fmt: skip
            stream = client.makefile("rb")
            while stream.readline().strip():
                pass
            while time.monotonic() < end:
                call = {"id": 1, "method": "Runtime.evaluate", "params": {"expression": expression}}
                send(client, json.dumps(call).encode())
                value = receive(stream)["result"]["result"].get("value")
                if value not in (None, ""):
                    return value
                time.sleep(0.1)
        raise AssertionError(f"{expression}: got nothing within {seconds:g} s")
    finally:
        process.kill()
        process.wait()


def send(client: socket.socket, data: bytes) -> None:
    """A text frame of a client: masked, here with zeros."""
    head = bytes([0x81]) + (bytes([0x80 | len(data)]) if len(data) < 126 else
                            struct.pack("!BH", 0xFE, len(data)))  # fmt: skip
    client.sendall(head + bytes(4) + data)


def receive(stream: object) -> dict:
    """The value of a text frame of a server."""
    _, size = stream.read(2)
    if size >= 126:
        [size] = struct.unpack("!H", stream.read(2)) if size == 126 else (
            struct.unpack("!Q", stream.read(8)))  # fmt: skip
    return json.loads(stream.read(size))
