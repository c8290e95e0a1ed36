# Pronk in a container. For a CPU:          docker build -t pronk .
#                      For an NVIDIA GPU:   docker build -t pronk:cuda --build-arg DEVICE=cuda .
# The two differ in the torch that is installed: CUDA's libraries come as wheels, so both stand on the same base.

# Any image with Python 3.11 or newer as python3, its venv module and pip. Both stages use it: the environment made in
# the first links to the interpreter of the second.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build

# cpu or cuda.
ARG DEVICE=cpu
# The torch to install, for example torch==2.13.0 (default: the range in pyproject.toml).
ARG TORCH_SPEC=
# The index torch comes from (default: PyTorch's CPU index for cpu, PyPI for cuda).
ARG TORCH_INDEX_URL=
# Where else packages may come from: pip reads these from the environment.
ARG PIP_INDEX_URL=https://pypi.org/simple
ARG PIP_FIND_LINKS=

WORKDIR /src
# No pip in the environment: the running server installs nothing.
RUN python3 -m venv --without-pip /opt/pronk
COPY pyproject.toml ./
# Dependencies before the source, so that a change in the source keeps these layers.
RUN python3 -c 'import tomllib; \
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > dependencies.txt
# torch alone, so that its index has a say in nothing else; and without its own tests, 150 MB.
RUN case "${DEVICE}" in \
        cpu) index=https://download.pytorch.org/whl/cpu ;; \
        cuda) index=${PIP_INDEX_URL} ;; \
        *) echo "DEVICE=${DEVICE}: choose cpu or cuda" >&2; exit 1 ;; \
    esac && \
    python3 -m pip --python /opt/pronk/bin/python install --no-cache-dir --no-deps \
        --index-url "${TORCH_INDEX_URL:-$index}" "${TORCH_SPEC:-$(grep '^torch' dependencies.txt)}" && \
    rm -rf /opt/pronk/lib/python3*/site-packages/torch/test /opt/pronk/lib/python3*/site-packages/torch/bin/test_*
# A torch for CUDA needs the Triton that fits it, and says so itself. A CPU needs none, and Triton is larger than torch.
RUN grep -v '^triton' dependencies.txt > needed.txt && \
    python3 -m pip --python /opt/pronk/bin/python install --no-cache-dir -r needed.txt
COPY . .
RUN python3 -m pip --python /opt/pronk/bin/python install --no-cache-dir --no-deps .

FROM ${BASE_IMAGE}

ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="Pronk" \
      org.opencontainers.image.description="An OpenAI-compatible inference server for the Llama 3.2 family" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"

# On a GPU Triton compiles what it launches kernels with, a few lines of C, when the server starts: with a compiler, and
# Python's headers, which the default base has.
ARG DEVICE=cpu
RUN if [ "${DEVICE}" = cuda ]; then \
        headers=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))') && \
        apt-get update && \
        apt-get install -y --no-install-recommends gcc libc6-dev $(test -e "$headers/Python.h" || echo python3-dev) && \
        rm -rf /var/lib/apt/lists/*; \
    fi

# A name for the uid: some libraries ask for one. Its home is all that the server writes to.
RUN echo 'pronk:x:10001:10001:Pronk:/var/lib/pronk:/usr/sbin/nologin' >> /etc/passwd && \
    echo 'pronk:x:10001:' >> /etc/group && \
    mkdir -p /var/lib/pronk && chown 10001:10001 /var/lib/pronk
COPY --from=build /opt/pronk /opt/pronk

ENV PATH=/opt/pronk/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/lib/pronk/huggingface \
    TRITON_CACHE_DIR=/var/lib/pronk/triton \
    PRONK_CACHE=/var/lib/pronk/kernels \
    PRONK_HOST=0.0.0.0 \
    PRONK_PORT=8000

USER 10001:10001
WORKDIR /var/lib/pronk
VOLUME ["/var/lib/pronk"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# /health is 200 only when a token can be made. Another port: set PRONK_PORT, so that this line knows it too.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['PRONK_PORT']), timeout=4); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["pronk"]
CMD ["serve"]
