"""Who computes where a GPU is asked by several threads, by processes that fork, and at Python's end."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from ramekin import Engine, ProviderError
from ramekin.device_thread import DeviceThread, one_at_a_time
from ramekin.tensors import LOGITS
from tests.runtime.conftest import CUDA_MODEL, OUT_OF_MEMORY, RUNS_CUDA_GRAPHS, Failing
from tests.runtime.conftest import CUDA_PARAMS as PARAMS


@pytest.fixture
def gpu(cuda: Engine) -> Engine:
    """Computed by the CPU, asked as a GPU is."""
    model: Any = cuda.model
    model._thread = DeviceThread("cuda")
    return cuda


def in_a_thread(run: Any, *arguments: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run, *arguments).result()


def may_be_taken(lock: Any) -> bool:
    """Whether another thread could have it."""

    def take() -> bool:
        taken = lock.acquire(blocking=False)
        if taken:
            lock.release()
        return bool(taken)

    return bool(in_a_thread(take))


@RUNS_CUDA_GRAPHS
def test_the_device_is_one_threads_alone(gpu: Engine) -> None:
    """Onnxruntime keeps recordings for threads, and no other engine's thread may come between."""
    model: Any = gpu.model
    threads: list[threading.Thread] = []

    def watch() -> None:
        threads.append(threading.current_thread())
        assert not may_be_taken(one_at_a_time())

    class Watched(Failing):
        def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
            watch()
            super().run_with_iobinding(binding, options)

    model._encoder, model._decoder = Watched(model._encoder, OUT_OF_MEMORY), Watched(model._decoder, OUT_OF_MEMORY)
    make = model._pool._make

    def made(plan: Any) -> Any:
        watch()
        return make(plan)

    model._pool._make = made

    def job() -> tuple[threading.Thread, set[threading.Thread]]:
        """Who asked, and who computed."""
        threads.clear()
        cache = model.new_cache(model.prefill([3, 1]), 2, 8, 4)
        logits = model.step([0, 0], cache)
        cache.recording, model._decoder._texts = 1, ["Graph capture failed"]
        model.step([0, 0], cache)
        value = cache.memory.values[LOGITS]
        cache.memory.values[LOGITS] = SimpleNamespace(numpy=lambda: (watch(), value.numpy())[1])
        assert len(logits.full) == 2
        cache.memory.values[LOGITS] = value
        assert len(threads) >= 5
        return threading.current_thread(), set(threads)

    for _ in range(2):
        asking, computing = job()
        assert computing == {asking}
    _, its_own = in_a_thread(job)
    for asking, computing in (in_a_thread(job), job(), in_a_thread(job)):
        assert computing == its_own != {asking}


@RUNS_CUDA_GRAPHS
def test_on_a_cpu_engines_do_not_wait_for_one_another(cuda: Engine) -> None:
    with one_at_a_time():
        found = in_a_thread(lambda: Engine.load(CUDA_MODEL).generate([3, 1], PARAMS))
        assert [each.token_ids for each in found] == [each.token_ids for each in cuda.generate([3, 1], PARAMS)]
        assert [each.token_ids for each in in_a_thread(cuda.generate, [3, 1], PARAMS)] == [each.token_ids for each in found]


@RUNS_CUDA_GRAPHS
@pytest.mark.parametrize("in_own_thread", [False, True])
def test_a_job_that_failed_gives_its_memory_back_at_once(in_own_thread: bool, gpu: Engine) -> None:
    """Not when the collector comes: the next job needs it."""
    model: Any = gpu.model
    gpu.generate([3, 1], PARAMS)
    if in_own_thread:
        in_a_thread(gpu.generate, [3, 1], PARAMS)
    assert bool(model._thread._own) == in_own_thread
    gc.collect()
    model._pool.give_up_idle()
    gc.disable()
    try:
        model._decoder = Failing(model._decoder, OUT_OF_MEMORY, OUT_OF_MEMORY)
        with contextlib.suppress(ProviderError):
            gpu.generate([3, 1], PARAMS)
        assert not model._decoder._texts
        model._thread.run(int)  # its own thread has let go of what it did before
        assert len([*model._pool._idle, *model._pool._returned]) == 2
    finally:
        gc.enable()


def test_where_there_are_no_more_threads_whoever_asks_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    def starts(_: object) -> None:
        raise RuntimeError("can't start new thread")

    device = DeviceThread("cuda")
    assert device.run(threading.current_thread) is threading.main_thread()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(threading.current_thread).result()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", starts)
            assert pool.submit(device.run, threading.current_thread).result() is other
            assert device.run(threading.current_thread) is threading.main_thread()
        assert device._own is None  # no half-made one, with work that nobody waits for
        assert pool.submit(device.run, threading.current_thread).result() not in (other, threading.main_thread())


def test_on_a_cpu_whoever_asks_computes() -> None:
    device = DeviceThread("cpu")
    for _ in range(2):
        assert device.run(threading.current_thread) is threading.main_thread()
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(threading.current_thread).result()
            assert pool.submit(device.run, threading.current_thread).result() is asking


def test_errors_come_as_they_are() -> None:
    def fails() -> None:
        raise ProviderError("no")

    device = DeviceThread("cuda")
    device.run(int)
    for run in (device.run, lambda function: in_a_thread(device.run, function), device.run):
        with pytest.raises(ProviderError, match=r"^no$"):
            run(fails)
    assert may_be_taken(one_at_a_time())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_its_parents_threads() -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with one_at_a_time():
            held.set()
            done.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    child = os.fork()
    if not child:
        os._exit(7 if DeviceThread("cuda").alone().acquire(timeout=10) else 1)
    _, status = os.waitpid(child, 0)
    done.set()
    other.join()
    assert os.waitstatus_to_exitcode(status) == 7


AT_THE_END = """
import sys, threading, time
from ramekin.device_thread import DeviceThread
device = DeviceThread("cuda")
device.run(int)
threading.Thread(target=lambda: print(device.run(lambda: "own"))).start()
def late():
    while threading.main_thread().is_alive():
        time.sleep(0.01)
    print(device.run(lambda: "late"))
threading.Thread(target=late).start()
"""


def test_threads_that_outlive_the_main_one_finish() -> None:
    done = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, timeout=60, check=False)
    assert sorted(done.stdout.split()) == ["late", "own"]
    assert done.stderr == ""
