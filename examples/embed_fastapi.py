"""A FastAPI program with a route of its own and OpenAI's API beside it: uvicorn embed_fastapi:app, in this folder."""

# curl localhost:8000/llm/v1/completions -H 'content-type: application/json' -d '{"prompt": "My dear", "max_tokens": 9}'
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from grok_engine import AsyncLLM, LLMEngine, SamplingParams
from grok_engine.server import create_app

llm = AsyncLLM(LLMEngine(os.environ.get("MODEL", "tiny")))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    await llm.drain(timeout=30)
    await llm.close()


app = FastAPI(lifespan=lifespan)
app.mount("/llm", create_app(llm, served_model_name="holmes"))


@app.get("/opening")
async def opening(words: int = 12) -> dict[str, str]:
    """The same engine from your own code: both kinds of requests share its batches and its cache."""
    async for output in llm.generate("My dear Watson,", SamplingParams(max_tokens=words, temperature=0)):
        text = output.outputs[0].text
    return {"text": text}
