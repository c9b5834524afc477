"""Starts a live engine in a child process and drives it as an Engine. Modes: stock, upstream's own mode, or armed."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bi_patch import errors
from bi_patch.errors import BiPatchError, SettingError
from bi_patch.tools.verify import wire
from bi_patch.tools.verify.answers import Answer, Request, checked
from bi_patch.tools.verify.engine import Info, Options

ARMED, UPSTREAM, STOCK = MODES = ("armed", "upstream", "stock")
_LOOK = 0.5  # seconds between two checks of a child whose reply is awaited
_END = 20.0  # seconds that an idle child may take to end
_DYING = 10.0  # seconds that killed processes may take to end

# Waiting threads sleep instead of spinning: on a busy machine spinning makes an engine many times slower. Only for runs
# that report no times; the bits stay the same.
PATIENT = {"OMP_WAIT_POLICY": "passive"}

_CODE = "import bi_patch_entry, sys; bi_patch_entry.run(sys.argv[1])"
_CACHES = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
_DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def known_mode(mode: str) -> str:
    """Return `mode`. Raises SettingError for an unknown mode, whose engine would be stock under another name."""
    if mode not in MODES:
        raise SettingError(f"there is no mode {mode!r}; the modes are {', '.join(MODES)}")
    return mode


class EngineFailed(BiPatchError):
    """A child's engine did not start, or stopped. `kind`: the class of the child's error. `log`: the child's output."""

    def __init__(self, message: str, *, kind: str = "", log: Path | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.log = log


class ChildEngine:
    """An Engine in a child process; use as a context manager. `seconds` is the time that the last generate took.

    mode: STOCK (bi_patch off), UPSTREAM (bi_patch off, vLLM's own batch-invariant mode on) or ARMED.
    fresh: start with empty caches of compiled code (vLLM's, inductor's, Triton's), which are deleted at the end.
    Raises the child's own named error (SeamOpen, UnsupportedFeature, ...). Raises EngineFailed for any other error; its
    message names the child's log, which is kept only in this case.
    """

    worker = "bi_patch.tools.verify.worker"  # the module whose `main` the child runs
    launch = staticmethod(subprocess.Popen)

    def __init__(
        self,
        mode: str,
        options: Options,
        *,
        environ: dict[str, str] | None = None,
        fresh: bool = False,
    ) -> None:
        self.mode, self.options = known_mode(mode), options
        self.seconds = 0.0
        self._held = b""  # the beginning of the next reply
        self._named = False  # whether an error named the log
        self._caches = tempfile.TemporaryDirectory(prefix="bi_patch-caches-", ignore_cleanup_errors=True)
        given = dict(os.environ if environ is None else environ)
        if fresh:
            empty = {name: os.path.join(self._caches.name, name.lower()) for name in _CACHES}
            _copy_model_classes(given, Path(empty["VLLM_CACHE_ROOT"]))
            given |= empty
        self._log = tempfile.NamedTemporaryFile(prefix=f"bi_patch-{mode}-", suffix=".log", delete=False)
        receive, give = os.pipe()
        try:
            self._process = (subprocess.Popen if fresh else self.launch)(
                [sys.executable, "-c", _CODE, self.worker, str(give)],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=(give,),
                start_new_session=True,  # an interrupt reaches only the parent, which then ends the child
                env=child_environ(given, mode, options),
            )
        finally:
            os.close(give)
        self._replies = os.fdopen(receive, "rb", buffering=0)
        try:
            self.info: Info = self._start()
        except BaseException as error:
            self.close(now=isinstance(error, KeyboardInterrupt))  # an interrupted child is in the middle of a command
            raise

    def __enter__(self) -> ChildEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close(now=isinstance(exc[1], KeyboardInterrupt))

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        reply = self._ask(wire.Command("generate", requests=list(requests)))
        self.seconds = reply.seconds
        return checked(requests, wire.unpack(reply.answers))

    def reset_cache(self) -> None:
        self._ask(wire.Command("reset_cache"))

    def set_chunk(self, tokens: int | None) -> None:
        self._ask(wire.Command("chunk", chunk=tokens))

    def set_logprobs(self, mode: str | None) -> None:
        self._ask(wire.Command("logprobs", text=mode or ""))

    def counters(self) -> dict[str, float]:
        return self._ask(wire.Command("counters")).counters

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._ask(wire.Command("encode", text=text)).tokens)

    def ask(self, do: str, data: bytes) -> bytes:
        """Run an instrument of verify.instruments in the child."""
        return self._ask(wire.Command(do, data=data)).data

    def close(self, *, now: bool = False) -> None:
        """End the child and all processes that it started, and wait until they are gone.

        now: do not let the child finish its current command.
        """
        try:
            if not now and self.alive():
                wire.send(self._process.stdin, wire.Command("stop"))
                self._process.wait(timeout=_END)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            pass  # _kill ends the child
        finally:
            self._kill()
            self._replies.close()
            self._log.close()
            self._caches.cleanup()
            if not self._named:
                Path(self._log.name).unlink(missing_ok=True)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the child leads a group of its own
        self._process.wait()
        until = time.monotonic() + _DYING
        while _runs(self._process.pid) and time.monotonic() < until:  # workers hold the device to their end
            time.sleep(0.02)

    def _start(self) -> Info:
        info = self._ask(wire.Command("start", options=self.options)).info
        assert info is not None
        expected = "armed" if self.mode == ARMED else "stock"
        if info.mode != expected:
            raise self._failed(f"the {self.mode} child says it is {info.mode}; its output is in {self._log.name}")
        if self.options.threads not in (None, info.threads):
            raise self._failed(f"the engine runs {info.threads} threads, not {self.options.threads}")
        if self.mode == STOCK:
            # A stock CPU engine dies (SIGILL) when its first request has four tokens or fewer.
            self.generate([Request(tuple(range(5, 40)), max_tokens=2)])
            if self.options.prefix_caching:
                self.reset_cache()
        return info

    def _ask(self, command: wire.Command) -> wire.Reply:
        try:
            wire.send(self._process.stdin, command)
            line = self._line()
        except (BrokenPipeError, ValueError):
            line = b""
        log = Path(self._log.name)
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_END)
            self._kill()
            code = self._process.returncode
            raise self._failed(
                f"the {self.mode} engine's process ended ({code}) at {command.do!r}{_hint(code)}; its output is in "
                f"{log}\n{_tail(log)}",
                f"exit {code}",
            )
        try:
            reply = msgspec.json.decode(line, type=wire.Reply)
        except msgspec.DecodeError as error:
            raise self._failed(
                f"the {self.mode} engine's reply to {command.do!r} cannot be read ({error}); its output is in {log}"
            ) from error
        kind = getattr(errors, reply.error, None)
        if reply.named and isinstance(kind, type) and issubclass(kind, BiPatchError):
            raise kind(reply.message)
        if reply.error:
            raise self._failed(
                f"the {self.mode} engine failed at {command.do!r}: {reply.error}: {reply.message}\nits output is in "
                f"{log}\n{_tail(log)}",
                reply.error,
            )
        return reply

    def _line(self) -> bytes:
        """The next whole reply, b"" when the child has ended.

        The end of the pipe is no sign of that: processes that the child started may hold the pipe open.
        """
        parts = [self._held]
        while b"\n" not in parts[-1]:
            if select.select([self._replies], [], [], _LOOK)[0]:
                parts.append(os.read(self._replies.fileno(), 1 << 20))
                if not parts[-1]:
                    return b""
            elif not self.alive():
                return b""
        line, _, self._held = b"".join(parts).partition(b"\n")
        return line

    def _failed(self, message: str, kind: str = "") -> EngineFailed:
        self._named = True
        return EngineFailed(message, kind=kind, log=Path(self._log.name))


def child_environ(environ: dict[str, str], mode: str, options: Options) -> dict[str, str]:
    """The environment of a child: `environ`, defaults for variables that it lacks, and the variables of `mode`."""
    made = {**_DEFAULTS, **environ}
    package = str(Path(__file__).resolve().parents[3])
    paths = [p for p in made.get("PYTHONPATH", "").split(os.pathsep) if p]
    # PYTHONPATH may begin with the sitecustomize of `bi-patch run`; BI_PATCH below decides the mode anyway.
    if Path(package).name not in ("site-packages", "dist-packages") and package not in paths:
        paths.append(package)
    made["PYTHONPATH"] = os.pathsep.join(paths)
    if options.eager:
        made["TORCHDYNAMO_DISABLE"] = "1"
    if options.threads is not None:
        # vLLM would take one thread for each core that it binds, whatever OpenMP's variable says.
        made |= {"OMP_NUM_THREADS": str(options.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    made.pop("VLLM_BATCH_INVARIANT", None)
    made["BI_PATCH"] = "1" if mode == ARMED else "0"
    if mode in (ARMED, UPSTREAM):
        made["VLLM_BATCH_INVARIANT"] = "1"
    return made


def _copy_model_classes(environ: dict[str, str], to: Path) -> None:
    """Copy what vLLM knows of models' classes from its cache. vLLM finds it out in a process that imports all of it."""
    home = environ.get("XDG_CACHE_HOME") or "~/.cache"
    known = Path(environ.get("VLLM_CACHE_ROOT") or f"{home}/vllm").expanduser() / "modelinfos"
    for file in known.glob("*.json"):
        (to / known.name).mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # vLLM replaces files
            shutil.copy(file, to / known.name)


def _hint(code: int) -> str:
    """The usual meaning of an exit status, "" where there is none."""
    if code == -signal.SIGKILL:
        return " (killed, most often for lack of memory: lower max_model_len, max_num_seqs or the size of the KV cache)"
    return f" ({signal.Signals(-code).name})" if code < 0 else ""


def _tail(log: Path, lines: int = 12) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def _runs(group: int) -> bool:
    """Whether a process of the group is alive. A process that waits to be reaped is not alive."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process ended meanwhile
            state, _, its = file.read_text().rpartition(")")[2].split()[:3]
            if int(its) == group and state not in "ZX":
                return True
    return False
