#!/usr/bin/env bash
# install_ffcv.sh PYTHON -- builds FFCV's source into PYTHON's environment, with uv of the PATH.
# Installs Debian's headers where it may. What is missing is said in one line; FFCV is optional, so that is no error.
set -u
python=$1
here=$(cd "$(dirname "$0")" && pwd)

missing() {
  command -v g++ >/dev/null || echo g++
  command -v pkg-config >/dev/null && pkg-config --version >/dev/null || echo pkg-config
  [ -e /usr/include/turbojpeg.h ] || pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
  [ -e /usr/include/opencv4/opencv2/core.hpp ] || echo libopencv-core-dev
  [ -e /usr/include/opencv4/opencv2/imgproc.hpp ] || echo libopencv-imgproc-dev
  "$python" -c 'import os, sysconfig as s; exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || echo python3-dev
}

lacking=$(missing | tr '\n' ' ')
if [ -n "$lacking" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends $lacking; } >/dev/null 2>&1
  lacking=$(missing | tr '\n' ' ')
fi
if [ -n "$lacking" ]; then
  echo "setup: no FFCV (data.decode=ffcv): missing ${lacking% } (Debian's names), and no right to install them"
  exit
fi
said=$(PKG_CONFIG_PATH="$here/opencv_for_ffcv" uv pip install -q --python "$python" --no-deps --no-build-isolation \
  --require-hashes -r "$here/../requirements-ffcv.txt" 2>&1) ||
  echo "setup: no FFCV (data.decode=ffcv): its build failed: $(echo "$said" | grep -iE 'error|failed' | tail -n 1)"
