"""Threads that hang in a disk hold nobody up."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from hapo_async.threads import DaemonThreads

HANGING = """
import asyncio, time
from hapo_async.threads import DaemonThreads

async def main():
    loop = asyncio.get_running_loop()
    loop.set_default_executor(DaemonThreads())
    loop.call_later(0.2, asyncio.current_task().cancel)
    await asyncio.to_thread(time.sleep, 100)

try:
    asyncio.run(main())
except asyncio.CancelledError:
    print("ended")
"""


def test_a_program_ends_though_a_thread_of_its_loop_hangs():
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "ended\n" and done.stderr == ""


def test_results_and_errors_come_back_and_only_so_many_work_at_a_time():
    running, most, lock = 0, 0, threading.Lock()

    def work(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        with lock:
            running -= 1
        return number if number != 13 else 1 // 0

    assert list(DaemonThreads(3).map(work, range(12))) == list(range(12)) and most == 3

    async def loop() -> int:
        asyncio.get_running_loop().set_default_executor(DaemonThreads())
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(work, 13)
        return await asyncio.to_thread(work, 7)

    assert asyncio.run(loop()) == 7
