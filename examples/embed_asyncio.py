"""A server that embeds the engine. A client sends one JSON line and gets one for every piece of text.

    python examples/embed_asyncio.py --port 8000 &
    echo '{"prompt": "To Sherlock Holmes she is always", "max_tokens": 40}' | nc localhost 8000

The line holds `prompt`, text or token ids, and any other field of SamplingParams. A client that goes away ends its
request; an interrupt ends the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from contextlib import aclosing, suppress
from functools import partial

from grok_engine import AsyncLLM, EngineClosedError, LLMEngine, RequestOutputKind, SamplingParams


async def serve(llm: AsyncLLM, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async def send(**message: object) -> None:
        writer.write(json.dumps(message).encode() + b"\n")
        await writer.drain()  # raises once the client has left; aclosing then ends the request

    with suppress(ConnectionError):
        try:
            request = json.loads(await reader.readline())
            prompt, kind = request.pop("prompt"), RequestOutputKind.DELTA
            async with aclosing(llm.generate(prompt, SamplingParams(**request, output_kind=kind))) as outputs:
                async for output in outputs:
                    answer = output.outputs[0]
                    await send(text=answer.text, token_ids=answer.token_ids, finish_reason=answer.finish_reason)
        except (ValueError, TypeError, KeyError, AttributeError, EngineClosedError) as error:
            await send(error=f"{type(error).__name__}: {error}")
    writer.close()


async def main() -> None:
    parser = argparse.ArgumentParser(description="serve a model on this machine, a JSON line a request")
    parser.add_argument("--model", default="tiny", help="tiny, or the folder of a checkpoint")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    args = parser.parse_args()
    llm = AsyncLLM(LLMEngine(args.model))
    server = await asyncio.start_server(partial(serve, llm), "127.0.0.1", args.port, limit=1 << 20)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    print(f"listening on 127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await stop.wait()
    server.close()
    print(llm.engine.stats(), flush=True)
    await llm.close()  # whoever still waits gets an EngineClosedError, of which serve tells the client
    if clients := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(clients, timeout=1)


if __name__ == "__main__":
    asyncio.run(main())
