# syntax=docker/dockerfile:1
# The server on a CPU; for NVIDIA GPUs build with --build-arg TORCH_INDEX=https://pypi.org/simple
ARG BASE=python:3.12-slim

FROM ${BASE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
RUN python3 -m venv /opt/arriero
ENV PATH=/opt/arriero/bin:$PATH
COPY constraints.txt ./
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" \
        --extra-index-url https://pypi.org/simple "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY model model
# One native library a level of instructions; which one runs is decided where it starts.
RUN pip install --no-cache-dir -c constraints.txt . && cd / && python -m model.cpu.build

FROM ${BASE}
LABEL org.opencontainers.image.title=arriero \
      org.opencontainers.image.licenses=Apache-2.0
COPY --from=build /opt/arriero /opt/arriero
RUN useradd --create-home --uid 1000 arriero && mkdir -p /home/arriero/.cache \
    && chown arriero /home/arriero/.cache
USER arriero
ENV PATH=/opt/arriero/bin:$PATH PYTHONUNBUFFERED=1
VOLUME /home/arriero/.cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s CMD ["python3", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready')"]
ENTRYPOINT ["arriero", "serve", "--host", "0.0.0.0"]
