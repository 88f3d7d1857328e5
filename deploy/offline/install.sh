#!/usr/bin/env bash
# Installs the bundle beside this file into FOLDER, without a registry: ./install.sh FOLDER [PYTHON]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?usage: ./install.sh FOLDER [PYTHON]}
python=${2:-python3}
want=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["python"])' "$here/BUNDLE.json")
have=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "$want" != "$have" ]; then
  echo "this bundle is for Python $want, $python is $have: give another as the second argument, or make a bundle with --python $have" >&2
  exit 1
fi
"$python" - "$here" <<'PY'
import hashlib, json, pathlib, sys
top = pathlib.Path(sys.argv[1])
for name, digest in json.loads((top / "BUNDLE.json").read_text())["files"].items():
    if hashlib.sha256((top / name).read_bytes()).hexdigest() != digest:
        sys.exit(f"{name} differs from what was packed: copy the bundle again")
PY
"$python" -m venv --without-pip "$folder"
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
cp -r "$here/site/." "$site/"
# Packages that the host has itself (the bundle was made with --without) are found after those of the bundle. PYTHON may be
# that of an environment, whose packages --system-site-packages would not show.
"$python" - "$here/BUNDLE.json" "$site/host-packages.pth" <<'PY'
import json, pathlib, sys, sysconfig
bundle, target = sys.argv[1:]
if json.loads(pathlib.Path(bundle).read_text())["without"]:
    paths = {sysconfig.get_paths()[name]: None for name in ("purelib", "platlib")}
    pathlib.Path(target).write_text("".join(f"{path}\n" for path in paths))
PY
for command in "tpserve:tpserve.cli" "bench-tp:tpserve.coordinator.bench.__main__"; do
  name=${command%%:*} module=${command#*:}
  printf '#!%s\nimport sys\n\nfrom %s import main\n\nsys.exit(main())\n' "$folder/bin/python" "$module" > "$folder/bin/$name"
  chmod 755 "$folder/bin/$name"
done
if [ -d "$here/libraries" ]; then cp -r "$here/libraries" "$folder/libraries"; fi
echo "installed: $folder/bin/tpserve serve MODEL --device cuda --model-lib $folder/libraries/NAME"
