# syntax=docker/dockerfile:1
# The server on a CPU. docs/serving.md says how to build and to run it.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/llava-cot
ENV PATH=/opt/llava-cot/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The wheel's kernels are compiled against the torch of this environment, so torch comes first.
RUN pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
COPY . /src
RUN pip wheel --no-deps --wheel-dir /wheels /src
RUN pip install "$(echo /wheels/llava_cot-*.whl)[serve]"

FROM python:${PYTHON}-slim
RUN useradd --create-home --uid 10001 llava-cot
COPY --from=build /opt/llava-cot /opt/llava-cot
ENV PATH=/opt/llava-cot/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/llava-cot
EXPOSE 8000
HEALTHCHECK --start-period=5m --interval=10s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Listening at 0.0.0.0 takes an API key, or --allow-no-key.
ENTRYPOINT ["llava-cot", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--model", "tiny"]
