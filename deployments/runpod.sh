#!/bin/bash
# The start command of a RunPod pod made from the image of deployments/Dockerfile. Give the pod a volume at /data and
# these variables: RECIPE (a path or an s3:// URL that `aws s3 cp` reaches), REGROW_STORE, AWS_* for the store.
# A spot pod gets SIGTERM before it goes: the run saves its state, and the next pod with the same store goes on.
set -eu
recipe=${RECIPE:?the recipe, e.g. configs/quickstart.yaml}
case $recipe in
s3://*)
    python -c 'import fsspec, sys; open("/data/recipe.yaml", "wb").write(fsspec.open(sys.argv[1]).open().read())' "$recipe"
    recipe=/data/recipe.yaml
    ;;
esac
exec regrow run "$recipe"
