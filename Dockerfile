# convserve in a container: `docker build -t convserve .`, then
# `docker run --init -p 8000:8000 -v convserve-cache:/cache convserve`.
# docs/deployment.md has the GPU image, models of your own, and what the image needs to run.
ARG PYTHON_IMAGE=python:3.12.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# PyTorch's index of CPU builds. Empty for the usual build, which runs on NVIDIA GPUs.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# `[otel]` adds what --otlp-traces-endpoint needs.
ARG EXTRAS=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY constraints.txt ./
RUN python -m venv /opt/convserve \
    && /opt/convserve/bin/pip install --constraint constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} setuptools torch
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY engine engine
COPY kernels kernels
COPY cache cache
COPY loadtest loadtest
# What torch has for those who build or test it (200 MB) stays behind.
RUN /opt/convserve/bin/pip install --constraint constraints.txt --no-build-isolation ".${EXTRAS}" \
    && find /opt/convserve/lib/python3*/site-packages/torch -depth \
        \( -path '*/torch/include/*' -o -path '*/torch/share/*' -o -path '*/torch/test/*' \
        -o -path '*/torch/bin/*' ! -name torch_shm_manager \) -delete

FROM ${PYTHON_IMAGE}
# The CPU kernels (at the first start) and Triton's launchers are compiled on the machine that runs
# them, for its processor. Debian's point releases replace each other, so no version is named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin convserve \
    && install --directory --owner=convserve --group=convserve /cache
COPY --from=build /opt/convserve /opt/convserve
# /cache keeps the imported default model and everything that was compiled.
ENV PATH=/opt/convserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cache \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton
VOLUME /cache
USER 10001
WORKDIR /home/convserve
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
# Exec form: the server is the process that gets SIGTERM. A model folder and flags may follow.
ENTRYPOINT ["convserve", "serve", "--host", "0.0.0.0"]
