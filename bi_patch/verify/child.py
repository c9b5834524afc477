"""A child process with a live engine, seen from the parent as an Engine. Stock, upstream's mode, or armed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bi_patch import errors
from bi_patch.errors import BiPatchError
from bi_patch.verify import wire
from bi_patch.verify.answers import Answer, Request
from bi_patch.verify.engine import Info, Options

STOCK, UPSTREAM, ARMED = "stock", "upstream", "armed"

# Waiting threads sleep instead of spinning: on a busy machine spinning makes an engine many times slower. For runs
# whose times nobody reads; the bits do not depend on it.
PATIENT = {"OMP_WAIT_POLICY": "passive"}

# bi_patch_entry first: importing bi_patch would arm before the child can report what arming raises.
_CODE = "import bi_patch_entry; from bi_patch.verify.worker import main; main()"
_CACHES = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
_DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class EngineFailed(BiPatchError):
    """A child's engine did not start, or stopped. `kind` is the class of the child's error, `log` its output."""

    def __init__(self, message: str, *, kind: str = "", log: Path | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.log = log


class ChildEngine:
    """An Engine in a child process; use it as a context manager. Also keeps `seconds`, the last generate's time.

    mode: STOCK (bi_patch off), UPSTREAM (bi_patch off, vLLM's own batch-invariant mode on) or ARMED.
    fresh: start with empty compile caches (vLLM's, inductor's, Triton's), which are deleted at the end.
    lifts: refusals that this child does not make (verify.faults.lifts), to show what they keep out.
    Raises the child's own named error (SeamOpen, UnsupportedFeature, ...), or EngineFailed for any other.
    """

    def __init__(self, mode: str, options: Options, *, environ: dict[str, str] | None = None,
                 fresh: bool = False, lifts: Sequence[str] = ()) -> None:
        self.mode, self.options = mode, options
        self.seconds = 0.0
        self._erred = False  # an error was reported that names the log
        self._caches = tempfile.TemporaryDirectory(prefix="bi_patch-caches-", ignore_cleanup_errors=True)
        given = dict(os.environ if environ is None else environ)
        if fresh:
            given |= {name: os.path.join(self._caches.name, name.lower()) for name in _CACHES}
        self._log = tempfile.NamedTemporaryFile(prefix=f"bi_patch-{mode}-", suffix=".log", delete=False)
        receive, give = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CODE, str(give)],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=(give,),
                start_new_session=True,  # an interrupt is for the parent, which then ends the child
                env=child_environ(given, mode, options),
            )
        finally:
            os.close(give)
        self._replies = os.fdopen(receive, "rb")
        try:
            self.info: Info = self._start(lifts)
        except BaseException:
            self.close(keep_log=True)
            raise

    def __enter__(self) -> ChildEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is not None and issubclass(exc[0], KeyboardInterrupt):
            self._process.kill()  # it is in the middle of a command
        self.close(keep_log=exc[0] is not None)

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        reply = self._ask(wire.Command("generate", requests=list(requests)))
        self.seconds = reply.seconds
        return wire.unpack(reply.answers)

    def reset_cache(self) -> None:
        self._ask(wire.Command("reset_cache"))

    def set_chunk(self, tokens: int | None) -> None:
        self._ask(wire.Command("chunk", chunk=tokens))

    def counters(self) -> dict[str, float]:
        return self._ask(wire.Command("counters")).counters

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._ask(wire.Command("encode", text=text)).tokens)

    def ask(self, do: str, data: bytes) -> bytes:
        """One of verify.instruments, which the child serves."""
        return self._ask(wire.Command(do, data=data)).data

    def close(self, *, keep_log: bool = False) -> None:
        """End the child and wait for it; its log is deleted unless it is kept for an error."""
        if self._process.poll() is None:
            try:
                wire.send(self._process.stdin, wire.Command("stop"))
                self._process.wait(timeout=20)
            except (OSError, ValueError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        self._replies.close()
        self._log.close()
        self._caches.cleanup()
        if not keep_log and not self._erred:
            Path(self._log.name).unlink(missing_ok=True)

    def _start(self, lifts: Sequence[str]) -> Info:
        data = msgspec.msgpack.encode(list(lifts)) if lifts else b""
        info = self._ask(wire.Command("start", options=self.options, data=data)).info
        assert info is not None
        expected = "armed" if self.mode == ARMED else "stock"
        if info.mode != expected:
            raise EngineFailed(f"the {self.mode} child says it is {info.mode}", log=Path(self._log.name))
        if self.mode == STOCK:
            # A stock CPU engine dies (SIGILL) when its first request has four tokens or fewer.
            self.generate([Request(tuple(range(5, 40)), max_tokens=2)])
            if self.options.prefix_caching:
                self.reset_cache()
        return info

    def _ask(self, command: wire.Command) -> wire.Reply:
        try:
            wire.send(self._process.stdin, command)
            line = self._replies.readline()
        except (BrokenPipeError, ValueError):
            line = b""
        log = Path(self._log.name)
        if not line:
            code = self._process.wait()
            raise EngineFailed(
                f"the {self.mode} engine's process ended ({code}) at {command.do!r}{_hint(code)}; its output is in "
                f"{log}\n{_tail(log)}", kind=f"exit {code}", log=log,
            )
        reply = msgspec.json.decode(line, type=wire.Reply)
        if reply.error:
            self._erred = True
            raise _error(self.mode, command.do, reply, log)
        return reply


def child_environ(environ: dict[str, str], mode: str, options: Options) -> dict[str, str]:
    """The environment of a child: `environ`, defaults for what it leaves open, and what `mode` means."""
    made = {**_DEFAULTS, **environ}
    package = str(Path(__file__).resolve().parent.parent.parent)
    paths = [p for p in made.get("PYTHONPATH", "").split(os.pathsep) if p]
    # A sitecustomize of `bi-patch run` may stand first; the child is told its mode by its environment anyway.
    if Path(package).name not in ("site-packages", "dist-packages") and package not in paths:
        paths.append(package)
    made["PYTHONPATH"] = os.pathsep.join(paths)
    if options.eager:
        made["TORCHDYNAMO_DISABLE"] = "1"
    made.pop("VLLM_BATCH_INVARIANT", None)
    made["BI_PATCH"] = "1" if mode == ARMED else "0"
    if mode in (ARMED, UPSTREAM):
        made["VLLM_BATCH_INVARIANT"] = "1"
    return made


def _error(mode: str, doing: str, reply: wire.Reply, log: Path) -> BiPatchError:
    """The child's named error as its own class where the parent knows it, else EngineFailed."""
    kind = getattr(errors, reply.error, None)
    if reply.named and isinstance(kind, type) and issubclass(kind, BiPatchError):
        return kind(reply.message)
    return EngineFailed(
        f"the {mode} engine failed at {doing!r}: {reply.error}: {reply.message}\nits output is in {log}\n{_tail(log)}",
        kind=reply.error, log=log,
    )


def _hint(code: int) -> str:
    """What an exit status usually means."""
    if code == -signal.SIGKILL:
        return " (killed, most often for memory: lower max_model_len, max_num_seqs or the KV cache)"
    return f" ({signal.Signals(-code).name})" if code < 0 else ""


def _tail(log: Path, lines: int = 12) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
