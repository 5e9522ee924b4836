# docker build -t lostreg .                                                                     for CPUs
# docker build -t lostreg --build-arg TORCH=https://download.pytorch.org/whl/cu128 .            for NVIDIA GPUs (run with --gpus all)
# docker run --rm -v "$PWD":/work lostreg predict photo.jpg --backbone imgfocus_vits14 --plot found.png
#
# Not built by the tests, which have no Docker: say so in an issue where it fails.
FROM python:3.12-slim

ARG TORCH=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir "torch>=2.6" torchvision --index-url "$TORCH"

COPY pyproject.toml README.md LICENSE /lostreg/
COPY lostreg /lostreg/lostreg
RUN pip install --no-cache-dir "/lostreg[offline,heif,lake]" && rm -r /lostreg

RUN useradd --create-home user
USER user
WORKDIR /work
ENTRYPOINT ["lostreg"]
CMD ["--help"]
