#!/bin/bash
# The start command of a RunPod pod made from the image of deployments/Dockerfile. Give the pod a volume at /data and
# these variables: RECIPE (a path or an s3:// URL), REGROW_STORE, AWS_* for the store and the recipe.
# A spot pod gets SIGTERM before it goes: the run saves its state, and the next pod with the same store goes on.
set -eu
recipe=${RECIPE:?the recipe, e.g. configs/quickstart.yaml}
case $recipe in
s3://*)
    here=${XDG_DATA_HOME:-/data}/recipe.yaml
    python -c 'import fsspec, sys; f = fsspec.open(sys.argv[1]); f.fs.get_file(f.path, sys.argv[2])' "$recipe" "$here"
    recipe=$here
    ;;
esac
exec regrow run "$recipe"
