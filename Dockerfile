# tandem in a container: cpu, cuda or hpu (docker build --target). docs/guide/containers.md says how each is
# built and run. BuildKit is needed for --mount; Docker has it by default since 23.0.

# The image must be of the release of the Gaudi driver on the machine.
ARG GAUDI_IMAGE=vault.habana.ai/gaudi-docker/1.24.1/ubuntu24.04/habanalabs/pytorch-installer-2.11.0:latest

# The wheel is pure Python and the same for all. requirements.txt names what it depends on, so that a
# change of the sources does not install the dependencies again.
FROM python:3.11-slim-trixie AS wheel
WORKDIR /source
RUN --mount=type=bind,source=requirements,target=/requirements \
    pip install --no-cache-dir --constraint /requirements/lock.txt build setuptools wheel
COPY pyproject.toml README.md LICENSE NOTICE ./
RUN mkdir /needed && python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*project['dependencies'], *project['optional-dependencies']['notebook'], sep='\n')" > /needed/requirements.txt
COPY src src
RUN python -m build --wheel --no-isolation --outdir /wheels


# What cpu and cuda share. The locked versions were tested with this Python.
FROM python:3.11-slim-trixie AS runtime
# The compilers are for the run: tandem compiles its CPU kernels (C) for the processor that it finds,
# and torch.compile what it generates (C++, and the launchers of GPU kernels).
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ gcc \
    && rm -rf /var/lib/apt/lists/*
# Sticky and open like /tmp, for users given by `docker run --user` as well. USER is what torch names its
# folders after where the user has no name.
RUN useradd --no-create-home --uid 1000 tandem \
    && install --directory --mode=1777 /cache /work /home/tandem
ENV HOME=/home/tandem \
    USER=tandem \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    PYTHONUNBUFFERED=1
VOLUME ["/cache"]
WORKDIR /work
ENTRYPOINT ["tandem"]
CMD ["--help"]


# torch's wheels on PyPI bring CUDA's libraries and the driver comes from the machine, so there is
# nothing that an image with CUDA would add, and nvcc, which only DeepSpeed's own operators would want,
# is left out.
FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton
RUN --mount=type=bind,source=requirements,target=/requirements \
    --mount=type=bind,from=wheel,source=/needed,target=/needed \
    pip install --no-cache-dir --constraint /requirements/lock.txt \
        --requirement /needed/requirements.txt --requirement /requirements/notebook.txt
# The extras quant and deepspeed. DeepSpeed is built as `make setup` builds it, without operators of its
# own, for which a build has neither a GPU nor nvcc.
RUN --mount=type=bind,source=requirements,target=/requirements \
    pip install --no-cache-dir --constraint /requirements/lock.txt \
        bitsandbytes einops hjson msgpack ninja py-cpuinfo setuptools wheel \
    && DS_ACCELERATOR=cpu DS_BUILD_OPS=0 pip install --no-cache-dir --no-deps --no-build-isolation \
        --requirement /requirements/deepspeed.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl \
    && pip check
COPY --chown=1000:1000 notebooks/tutorial.ipynb /work/notebooks/
USER 1000


# Habana's image has the only torch that works on its cards, so everything is installed around it.
# Root, as the base is: nobody has shown here that its runtime, device files and log folders serve
# another user. DeepSpeed is left to the user; docs/guide/containers.md says why.
FROM ${GAUDI_IMAGE} AS hpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PYTHONUNBUFFERED=1
WORKDIR /opt/tandem
# `pip freeze` would name the files that these were installed from, which are gone. setuptools stays
# the image's as well: its torch may not take a newer one.
RUN --mount=type=bind,source=requirements,target=/requirements \
    python3 -m pip list --format=freeze | grep -iE '^(torch|habana)' > kept.txt \
    && grep -vE '^(torch|setuptools)==' /requirements/lock.txt > constraints.txt \
    && cat kept.txt >> constraints.txt
RUN --mount=type=bind,source=requirements,target=/requirements \
    --mount=type=bind,from=wheel,source=/needed,target=/needed \
    python3 -m pip install --no-cache-dir --constraint constraints.txt \
        --requirement /needed/requirements.txt --requirement /requirements/notebook.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python3 -m pip install --no-cache-dir --no-deps /wheels/*.whl
# A build that has changed torch or Habana's own packages ends here.
RUN python3 -m pip list --format=freeze | grep -iE '^(torch|habana)' | diff kept.txt -
COPY notebooks/tutorial.ipynb /work/notebooks/
VOLUME ["/cache"]
WORKDIR /work
ENTRYPOINT ["tandem"]
CMD ["--help"]


# Last, so that a build without --target makes the one that runs everywhere.
FROM runtime AS cpu
# Without --no-deps the CPU index would choose other versions of torch's dependencies.
RUN --mount=type=bind,source=requirements,target=/requirements \
    pip install --no-cache-dir --no-deps --index-url https://download.pytorch.org/whl/cpu \
        "$(grep '^torch==' /requirements/lock.txt)"
RUN --mount=type=bind,source=requirements,target=/requirements \
    --mount=type=bind,from=wheel,source=/needed,target=/needed \
    pip install --no-cache-dir --constraint /requirements/lock.txt \
        --requirement /needed/requirements.txt --requirement /requirements/notebook.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl \
    && pip check
COPY --chown=1000:1000 notebooks/tutorial.ipynb /work/notebooks/
USER 1000
