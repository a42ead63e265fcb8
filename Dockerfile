# syntax=docker/dockerfile:1
# Two images. For CPUs:  docker build -t outrigger .
#   docker run --rm --read-only --tmpfs /tmp --stop-timeout 100 -p 8000:8000 -v outrigger-models:/var/cache/outrigger outrigger
# For NVIDIA GPUs (compute capability 8.0 or later, driver 580 or later):  docker build --target cuda -t outrigger:cuda .
#   docker run --rm --gpus all --read-only --tmpfs /tmp --stop-timeout 100 -p 8000:8000 -v outrigger-models:/var/cache/outrigger outrigger:cuda
# Docker's own grace of 10 s would cut running streams: --stop-timeout must exceed shutdown_timeout (30 s) and relay_timeout (60 s) together.

FROM rust:1.95-slim-bookworm AS source
WORKDIR /source
COPY . .

FROM source AS build-cpu
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/source/target \
    cargo build --release --locked --bin outrigger \
    && install -D --strip target/release/outrigger /out/outrigger

FROM source AS build-cuda
RUN apt-get update && apt-get install --yes --no-install-recommends g++ python3-minimal python3-pip && rm -rf /var/lib/apt/lists/*
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/source/target \
    kernels/cuda/toolkit \
    && cargo build --release --locked --features cuda --bin outrigger \
    && install -D --strip target/release/outrigger /out/outrigger

FROM debian:bookworm-slim AS runtime
# Certificates for the model hub; pip for the catalog's source of last resort, which sites behind a package mirror use.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3-minimal python3-pip \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --no-create-home --home-dir /nonexistent outrigger \
    && install -d -o outrigger -g outrigger /var/cache/outrigger
USER 10001:10001
# The one place that is written to; everything else may be read-only (with a tmpfs on /tmp for pip).
VOLUME /var/cache/outrigger
ENV OUTRIGGER_HOME=/var/cache/outrigger \
    OUTRIGGER_HOST=0.0.0.0 \
    OUTRIGGER_LOG_FORMAT=json
# 8000: the API. 7946: gossip (UDP) and calls between nodes (TCP), where gossip_addr is set.
EXPOSE 8000 7946/tcp 7946/udp
STOPSIGNAL SIGTERM
# It reads the same configuration: change the port by OUTRIGGER_PORT or a file, not by a flag of `serve` alone.
# Liveness, not readiness: an orchestrator that replaces unhealthy containers must not replace one that is loading or busy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["outrigger", "healthcheck"]
ENTRYPOINT ["outrigger"]
CMD ["serve"]

# NVIDIA's CUDA runtime images are not needed, which saves gigabytes: the kernels are inside the binary, and all that it loads
# is the driver's library, which NVIDIA's container toolkit mounts when the container is given a GPU.
FROM runtime AS cuda
# A container that was meant to have a GPU and has none ends with the reason. OUTRIGGER_DEVICE=auto takes what there is.
ENV OUTRIGGER_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /out/outrigger /usr/local/bin/outrigger

# The last stage is what is built when none is named.
FROM runtime AS cpu
COPY --from=build-cpu /out/outrigger /usr/local/bin/outrigger
