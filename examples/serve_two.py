"""Two models in one process, each under its own prefix: serve_two.py PORT NAME=MODEL NAME=MODEL ..."""

# python examples/serve_two.py 8000 small=tiny other=model.gguf; the address of each is http://localhost:8000/NAME/v1
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from grok_engine import AsyncLLM, LLMEngine
from grok_engine.server import create_app


def mounted(name: str, model: str) -> Mount:
    # Without a size, the first engine's KV cache would take what the second one needs.
    llm = AsyncLLM(LLMEngine(model, kv_memory=256 << 20))
    return Mount(f"/{name}", create_app(llm, served_model_name=name))


if __name__ == "__main__":
    port, *models = sys.argv[1:]
    app = Starlette(routes=[mounted(*given.split("=", 1)) for given in models])
    uvicorn.run(app, host="127.0.0.1", port=int(port), timeout_graceful_shutdown=30)
