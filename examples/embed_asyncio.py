"""A server that embeds the engine, embed_asyncio.py [MODEL [PORT]]: a JSON line in, one out for every piece of text."""

# echo '{"prompt": "My dear Watson,", "max_tokens": 40}' | nc localhost 8000    (or any other field of SamplingParams)
import asyncio
import json
import signal
import sys
from contextlib import aclosing, closing, suppress
from functools import partial

from grok_engine import AsyncLLM, EngineClosedError, LLMEngine, RequestOutputKind, SamplingParams


async def serve(llm: AsyncLLM, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError), closing(writer):
        try:
            request = {"output_kind": RequestOutputKind.DELTA, **json.loads(await reader.readline())}
            async with aclosing(llm.generate(request.pop("prompt"), SamplingParams(**request))) as outputs:
                async for output in outputs:
                    line = {k: getattr(output.outputs[0], k) for k in ("text", "token_ids", "finish_reason")}
                    writer.write(json.dumps(line).encode() + b"\n")
                    await writer.drain()  # raises once the client has left: aclosing then ends its request
        except (ValueError, TypeError, KeyError, EngineClosedError) as error:
            writer.write(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n")


async def main(model: str = "tiny", port: str = "8000") -> None:
    llm, stop = AsyncLLM(LLMEngine(model)), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with await asyncio.start_server(partial(serve, llm), "127.0.0.1", int(port)) as server:
        print(f"listening on 127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await stop.wait()
        print(llm.engine.stats(), flush=True)
        await llm.close()  # whoever still waits gets an EngineClosedError
        await asyncio.sleep(0.1)  # and says so to its client


asyncio.run(main(*sys.argv[1:]))
