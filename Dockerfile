# Two stages: the first has the tools and makes a virtualenv, the second has Python and that virtualenv only.

FROM python:3.13-slim-trixie AS build

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PIP_ONLY_BINARY=:all:

WORKDIR /build

# Runtime packages first: this layer is rebuilt only when the lock changes. Every file is checked against its hash.
# pip stays outside the virtualenv, so the final image's virtualenv has no installer.
COPY requirements.lock ./
RUN python -m venv --without-pip /opt/venv \
 && pip --python /opt/venv/bin/python install --no-compile --no-deps --require-hashes --requirement requirements.lock

# The build backend and its dependencies, as the development lock pins them. The lock is not passed as a constraint, because
# a pip older than 26.1, as in many images, takes no hashes from one.
COPY requirements-dev.lock ./
RUN awk '/^[a-z]/ {wanted = /^(hatchling|packaging|pathspec|pluggy|tomlkit|trove-classifiers)==/} wanted' \
      requirements-dev.lock >build.lock \
 && pip install --no-deps --require-hashes --requirement build.lock

# The project itself. --no-index and --no-deps: nothing may come from the network from here on.
# LICENSE and README are part of the wheel's metadata.
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY app ./app
RUN pip wheel --no-index --no-deps --no-build-isolation --wheel-dir dist . \
 && pip --python /opt/venv/bin/python install --no-index --no-deps --no-compile dist/*.whl \
 # numpy ships 12 MB of its own tests
 && find /opt/venv/lib -type d -path '*/numpy/*' -name tests -prune -exec rm -rf {} + \
 # Compiled here because the root file system is read-only later. Unchecked, because an image's files do not change.
 && python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib


FROM python:3.13-slim-trixie

# A fixed, high uid: Kubernetes' runAsNonRoot needs a number, and no host account should share it.
# /data is for a disk cache; a named volume mounted there inherits the owner. It belongs to the root group too, because
# OpenShift runs containers with an arbitrary uid in that group.
RUN groupadd --gid 10001 gateway \
 && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin gateway \
 && install --directory --owner=10001 --group=0 --mode=0770 /data

COPY --from=build /opt/venv /opt/venv

# PYTHONSAFEPATH: Python never loads code from the working directory, which is writable.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1

# Relative paths (./config.yaml, ./embeddings.sqlite3) resolve here.
WORKDIR /data
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM

# By default the program listens on loopback, where nothing outside the container could reach it. Variables rather than
# flags, so that `docker run -e` can set another port and the health check follows. As everywhere, they override a config
# file, which may have been written for a plain machine.
ENV EMBEDDING_GATEWAY__SERVER__HOST=0.0.0.0 \
    EMBEDDING_GATEWAY__SERVER__PORT=8080

# Python is the image's only HTTP client. ProxyHandler({}): an HTTP_PROXY meant for the upstreams must not catch this.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open(f'http://127.0.0.1:{os.environ.get(\"EMBEDDING_GATEWAY__SERVER__PORT\") or 8080}/healthz', timeout=2)"]

# Exec form: the program is process 1 and receives SIGTERM itself, which starts its drain.
ENTRYPOINT ["embedding-gateway"]
CMD ["serve"]

# Last, so that a new version or revision rebuilds no layer.
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="embedding-gateway" \
      org.opencontainers.image.description="One OpenAI-compatible /v1/embeddings in front of every embedding vendor." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
