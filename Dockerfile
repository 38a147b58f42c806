# The package on CPUs: docker build -t minilm . && docker run --rm -v "$PWD:/work" minilm fill-mask out/mine "A [MASK] barks."
# To train: docker run --rm -v "$PWD:/work" --entrypoint accelerate minilm launch recipes/mlm_pydocs.py
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
COPY pyproject.toml setup.cfg README.md LICENSE /src/
COPY minilm /src/minilm
# torch's own index has the build for CPUs alone, which is a tenth of the size of the one with CUDA.
RUN pip install --extra-index-url https://download.pytorch.org/whl/cpu "torch>=2.11,<2.14" && pip install /src && rm -r /src

RUN useradd --create-home minilm
USER minilm
WORKDIR /work
ENTRYPOINT ["minilm"]
