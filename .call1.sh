export PYTHONUNBUFFERED=1 PYTHONPATH=/tmp/site:$PWD TOKENIZERS_PARALLELISM=true PYTORCH_ALLOC_CONF=expandable_segments:True PYTHONWARNINGS=ignore
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
t() { local s=$1; shift; echo "== $*"; local b=$SECONDS; timeout -k 5 $s "$@" > $OUT/log.txt 2>&1; local rc=$?; cat $OUT/log.txt >> $OUT/all.txt; grep -aE "^(OURS|TRL|profile|  +[0-9.]+ ms|FAILED|[0-9]+ passed)|passed|failed|Error|error:" $OUT/log.txt | cut -c1-400 | tail -${LINES_:-50}; [ $rc = 0 ] || tail -15 $OUT/log.txt | cut -c1-300; echo "-- rc $rc, $((SECONDS-b)) s"; }
P=python3
(timeout 150 python3 -m pytest -q -p no:cacheprovider -m gpu tests/stages/test_train_adamw.py tests/stages/test_train_lora_linear.py tests/stages/test_train.py > $OUT/tests.txt 2>&1; tail -40 $OUT/tests.txt | cut -c1-300)
LINES_=45 t 150 $P -m benchmarks.train_ours 1b full --set micro_batch=4 --steps 10 --profile 8
LINES_=4 t 100 $P -m benchmarks.train_ours 1b lora --set micro_batch=4 --steps 10
LINES_=45 t 150 $P -m benchmarks.train_ours 8b lora --set micro_batch=1 --steps 8 --profile 6
