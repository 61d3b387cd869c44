"""A real `vllm serve`, started, awaited and always stopped."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO


class ServerError(RuntimeError):
    """The server stopped or never became healthy; the message ends with its log."""


@dataclass(frozen=True)
class Server:
    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()

    def totals(self) -> dict[str, float]:
        """What /metrics counts, by name, summed over labels."""
        from prometheus_client.parser import text_string_to_metric_families

        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics")):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0) + sample.value
        return found

    def healthy(self) -> bool:
        try:
            self.get("/health")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        return True


@contextlib.contextmanager
def serve(
    checkpoint: str | Path,
    *flags: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> Iterator[Server]:
    """Run `vllm serve checkpoint *flags` until the block ends; its whole process group goes with it.

    Yields once /health answers. Raises ServerError, with the end of the log, when the server stops before that or
    needs more than `timeout` seconds.
    """
    port = _free_port()
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm), "serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(port), *flags]
    with log.open("wb") as output:
        process = _start(command, output, {**os.environ, **(env or {})})
        server = Server(f"http://127.0.0.1:{port}", log, process)
        try:
            _await_health(server, time.monotonic() + timeout)
            yield server
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(command: list[str], output: IO[bytes], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=env,
        start_new_session=True,  # a process group of its own: engine and workers are stopped with it
    )


def _await_health(server: Server, deadline: float) -> None:
    while not server.healthy():
        if (code := server.process.poll()) is not None:
            raise ServerError(f"vllm serve stopped with status {code}; the end of {server.log}:\n{_tail(server.log)}")
        if time.monotonic() > deadline:
            raise ServerError(f"vllm serve is not healthy in time; the end of {server.log}:\n{_tail(server.log)}")
        time.sleep(0.25)


def _tail(log: Path, lines: int = 60) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the group to end, then make it: engine processes can outlive the API server."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
