# Two images of one server, needing BuildKit (Docker 23 and newer use it anyway):
#     docker build --target cpu -t arriero:cpu .         the default
#     docker build --target cuda -t arriero:cuda .       NVIDIA GPUs
# Any base with Python 3.11 or newer on Debian or Ubuntu will do: --build-arg BASE=...
ARG BASE=python:3.12-slim

FROM ${BASE} AS build
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt,sharing=locked \
    apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
RUN python3 -m venv /opt/arriero
ENV PATH=/opt/arriero/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./

FROM build AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-compile -c constraints.txt --index-url "${TORCH_INDEX}" \
        --extra-index-url https://pypi.org/simple "$(grep '^torch==' constraints.txt)"
# What only serves to compile against torch or to test it: headers, test programs, protoc.
RUN cd /opt/arriero/lib/python3*/site-packages/torch \
    && find bin -mindepth 1 ! -name torch_shm_manager -delete \
    && rm -r include test
COPY pyproject.toml README.md LICENSE ./
# All that it needs goes in with an empty arriero, so that a change of the code installs that alone.
RUN --mount=type=cache,target=/root/.cache/pip \
    mkdir app model && pip install --no-compile -c constraints.txt ".[otlp]"
COPY app app
COPY model model
# One native library a level of instructions; which one runs is decided where it starts.
# Bytecode only of what a server imports: of all that is installed, it would be 180 MB.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-compile --no-deps . \
    && cd / && python -m model.cpu.build && python -c 'import app.main'

FROM build AS build-cuda
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-compile -c constraints.txt "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
RUN --mount=type=cache,target=/root/.cache/pip \
    mkdir app model && pip install --no-compile -c constraints.txt ".[gpu,otlp]"
COPY app app
COPY model model
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-compile --no-deps . \
    && cd / && python -m model.cpu.build && python -c 'import app.main'

FROM ${BASE} AS runtime
RUN useradd --create-home --uid 1000 arriero \
    && install -d -o arriero -g arriero /home/arriero/.cache
ENV PATH=/opt/arriero/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
VOLUME /home/arriero/.cache
EXPOSE 8000
# Ready, not just alive: false while the model loads and from SIGTERM on.
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 CMD ["python3", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready')"]
ENTRYPOINT ["arriero", "serve", "--host", "0.0.0.0"]
LABEL org.opencontainers.image.title="arriero" \
      org.opencontainers.image.description="A model-serving microservice for LLaMA-family models with OpenAI's API" \
      org.opencontainers.image.licenses="Apache-2.0"

FROM runtime AS cuda
# Triton compiles a launcher for each kernel where it runs: a C compiler, libc's and Python's headers.
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt,sharing=locked \
    apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
RUN test -f "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
    || { echo "this base image lacks Python's headers, which Triton needs" >&2; exit 1; }
COPY --from=build-cuda /opt/arriero /opt/arriero
ENV TRITON_CACHE_DIR=/home/arriero/.cache/triton \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ARG VERSION REVISION
LABEL org.opencontainers.image.version="${VERSION}" org.opencontainers.image.revision="${REVISION}"
USER arriero

FROM runtime AS cpu
COPY --from=build-cpu /opt/arriero /opt/arriero
ARG VERSION REVISION
LABEL org.opencontainers.image.version="${VERSION}" org.opencontainers.image.revision="${REVISION}"
USER arriero
