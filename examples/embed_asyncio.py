"""A server that embeds the engine, embed_asyncio.py [MODEL [PORT]]: a JSON line in, one out for every piece of text."""

# echo '{"prompt": "My dear Watson,", "max_tokens": 40, "timeout": 9}' | nc localhost 8000
import asyncio
import json
import signal
import sys
from contextlib import aclosing, closing, suppress

from grok_engine import AsyncLLM, LLMEngine, RequestOutputKind, SamplingParams


async def serve(llm: AsyncLLM, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError), closing(writer):
        try:
            request = {"output_kind": RequestOutputKind.DELTA, **json.loads(await reader.readline())}
            prompt, timeout = request.pop("prompt"), request.pop("timeout", None)
            async with aclosing(llm.generate(prompt, SamplingParams(**request), timeout=timeout)) as outputs:
                async for output in outputs:  # what a slow client missed comes in one piece
                    line = {k: getattr(output.outputs[0], k) for k in ("text", "token_ids", "finish_reason")}
                    writer.write(json.dumps(line).encode() + b"\n")
                    await writer.drain()  # raises once the client has left: aclosing then aborts its request
        except (ValueError, TypeError, KeyError, RuntimeError) as error:  # RuntimeError: queue full, draining, closed
            writer.write(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n")


async def main(model: str = "tiny", port: str = "8000") -> None:
    llm, stop = AsyncLLM(LLMEngine(model)), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with llm, await asyncio.start_server(lambda *streams: serve(llm, *streams), "127.0.0.1", int(port)) as server:
        print(f"listening on 127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await stop.wait()
        await llm.drain(timeout=30)  # no new requests; what still runs after 30 s is aborted
        await asyncio.sleep(0.1)  # for the last lines
        print(llm.stats())


asyncio.run(main(*sys.argv[1:]))
