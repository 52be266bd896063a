"""R17 to R22: the server on real connections. What is done is in ``test_serve``; here it is done once or for long."""

import asyncio
import json
import signal
import time
from pathlib import Path

import httpx

import test_serve as serving
from chaos.record import Bench, Result, Row, Tally
from chaos.supply import saved


def malformed(bench: Bench) -> Result:
    """Send every malformed request, and a good one after each."""
    run, rounds = saved(bench.folder), bench.pick(1, 20)
    right, tally = serving.expected(run, [serving.IMAGE]), Tally(bench, of=rounds * len(serving.MALFORMED))
    with serving.serving(run, receive_s=2.5) as server:
        for _ in range(rounds):
            for what, data in serving.MALFORMED.items():
                head, _, body = server.raw(data).partition(b"\r\n\r\n")
                status = int(head.split()[1]) if head else 0
                wrong = None if 400 <= status < 500 and body.startswith(b"{") else f"answered {status}"
                reply = httpx.post(f"{server.url}/predict", content=serving.IMAGE, headers=serving.PNG, timeout=20)
                tally.add(what, wrong or (None if reply.json().get("images") == right else "another answer afterwards"))
    return tally.result(f"{len(serving.MALFORMED)} kinds, each followed by a good request")


def _tests(bench: Bench, *names: str, run: Path | None = None, rounds: int = 1) -> Result:
    """Run tests of the server against one process of it, and count them."""
    run = run or saved(bench.folder)
    tally = Tally(bench, of=rounds * len(names))
    for _ in range(rounds):
        with serving.serving(run, receive_s=2.5) as server:
            for name in names:
                test = getattr(serving, f"test_{name}")
                wanted = {"server": server, "run": run, "tmp_path": bench.folder}
                words = test.__code__.co_varnames[: test.__code__.co_argcount]
                try:
                    test(**{word: wanted[word] for word in words})
                    tally.add(name)
                except BaseException as error:
                    tally.add(name, f"{type(error).__name__}: {error}")
    return tally.result()


def limits(bench: Bench) -> Result:
    """Send 1 GiB by length and in chunks, bombs, and a head that asks first."""
    names = ("what_is_too_large_is_refused_early_and_takes_no_memory",
             "a_client_that_waits_for_permission_is_refused_before_it_sends")  # fmt: skip
    return _tests(bench, *names, rounds=bench.pick(1, 5))


def slow(bench: Bench) -> Result:
    """Keep more slow connections open than there are file descriptors, and take no answers."""
    if bench.size == "ci":
        return _tests(bench, "a_client_that_does_not_take_its_answer_is_closed")
    return _tests(bench, "slow_clients_twice_as_many_as_open_files_refuse_nobody",
                  "a_client_that_does_not_take_its_answer_is_closed", rounds=3)  # fmt: skip


def load(bench: Bench) -> Result:
    """Ask much at a time, a tenth of it given up half way; every answer is held against `predict`."""
    run, total = saved(bench.folder), bench.pick(300, 10_000)
    images = [serving.picture(i, (16 + i % 7, 16)) for i in range(100)]
    rows, tally = serving.expected(run, images), Tally(bench, of=total)

    async def ask(port: int) -> None:
        places = asyncio.Semaphore(32)

        async def one(i: int) -> None:
            async with places:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                data = serving.request(images[i % 100])
                writer.write(data[: len(data) // 2] if i % 10 == 9 else data)
                if i % 10 == 9:
                    writer.close()
                    return tally.add("given up")
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
                writer.close()
                good = b" 200 " in head and serving.near(json.loads(body)["images"][0], rows[i % 100])
                tally.add("request", None if good or b" 503 " in head else f"another answer ({head[:30]!r})")

        await asyncio.gather(*(one(i) for i in range(total)))

    with serving.serving(run) as server:
        asyncio.run(ask(server.port))
    return tally.result(f"{total:,} requests by 32 clients, one of ten given up half way")


def stop(bench: Bench) -> Result:
    """Stop the server under load; `test_serve` counts what was accepted and what was answered."""
    run, tally = saved(bench.folder), Tally(bench)
    for i in range(bench.pick(1, 20)):
        sign = (signal.SIGTERM, signal.SIGINT)[i % 2]
        try:
            serving.test_a_stop_under_load_loses_nothing(run, sign)
            tally.add(sign.name)
        except BaseException as error:
            tally.add(sign.name, f"{type(error).__name__}: {error}")
    return tally.result("SIGTERM and SIGINT in turn")


def soak(bench: Bench) -> Result:
    """Ask for a while, with crashing clients in between; memory and descriptors must stay where they were."""
    run, seconds = saved(bench.folder), bench.pick(4, 1200)
    right, tally = serving.expected(run, [serving.IMAGE]), Tally(bench)
    with serving.serving(run) as server, httpx.Client(timeout=20) as client:
        fds = Path(f"/proc/{server.process.pid}/fd")

        def ask(until: float) -> None:
            while time.monotonic() < until:
                with server.connect() as connection:  # a client that crashes
                    connection.sendall(serving.request(serving.IMAGE)[:200])
                reply = client.post(f"{server.url}/predict", content=serving.IMAGE, headers=serving.PNG)
                tally.add("request", None if reply.json().get("images") == right else "another answer")

        ask(time.monotonic() + seconds / 2)
        memory, descriptors = server.memory(), len(list(fds.iterdir()))
        ask(time.monotonic() + seconds / 2)
        time.sleep(0.5)
        grown, more = server.memory() - memory, len(list(fds.iterdir())) - descriptors
    tally.add("memory", None if grown < bench.pick(20, 5) else f"it rose by {grown:.1f} MB")
    tally.add("descriptors", None if more <= 3 else f"{more} more are open")
    return tally.result(f"{seconds} s; memory {grown:+.1f} MB and descriptors {more:+d} over the second half")


ROWS = (
    Row(id="R17", part="malformed", fault="Malformed requests: noise, false lengths, heads, paths, forms, images",
        check="4xx in JSON each, no 5xx, and the next good request is answered right", run=malformed),
    Row(id="R18", part="limits", fault="1 GiB by length and in chunks, image bombs, Expect: 100-continue",
        check="413 before twice the limit is read; memory rises by less than 100 MB", run=limits),
    Row(id="R19", part="slow", fault="Slow clients: heads, bodies and answers; twice as many as open files (full size)",
        check="they are closed, and nobody else is refused", run=slow),
    Row(id="R20", part="load", fault="Many requests at a time, a tenth given up half way",
        check="each answer is that of predict; none is lost or swapped", run=load),
    Row(id="R21", part="stop", fault="SIGTERM and SIGINT under load",
        check="every accepted request is answered", run=stop),
    Row(id="R22", part="soak", fault="A long time with crashing clients",
        check="answers stay right; memory and open files stay flat", run=soak),
)  # fmt: skip
