export PYTHONUNBUFFERED=1 PYTHONPATH=/tmp/site:$PWD/.site:$PWD TOKENIZERS_PARALLELISM=true PYTORCH_ALLOC_CONF=expandable_segments:True PYTHONWARNINGS=ignore
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
t() { local s=$1; shift; local b=$SECONDS; timeout -k 5 $s python3 -m "$@" > $OUT/log.txt 2>&1; local rc=$?; { echo "== $*"; cat $OUT/log.txt; } >> $OUT/all.txt; grep -aE "^(OURS|TRL|LOSSES|profile|  +[0-9.]+ ms)|passed|FAILED" $OUT/log.txt | cut -c1-${CUT:-330} | head -${TOP:-6}; [ $rc = 0 ] || { echo "FAILED rc $rc: $*"; grep -aE "Error|assert" $OUT/log.txt | tail -3 | cut -c1-300; tail -4 $OUT/log.txt | cut -c1-200; }; echo "-- $((SECONDS-b)) s (at $SECONDS)"; }
python3 - <<'P'
import torch
a,b=(torch.randn(8192,8192,device="cuda",dtype=torch.bfloat16) for _ in range(2))
for _ in range(5): a@b
s,e=(torch.cuda.Event(enable_timing=True) for _ in range(2)); s.record()
for _ in range(30): a@b
e.record(); torch.cuda.synchronize(); print(f"CEILING {30*2*8192**3/s.elapsed_time(e)/1e9:.0f} TFLOP/s")
P
O=benchmarks.train_ours; T=benchmarks.train_trl
TOP=14 t 60 pytest -q -p no:cacheprovider -m gpu tests/stages/test_train_lora_mlp.py tests/stages/test_train_lora_linear.py -x
TOP=2 t 90 $O 1b full --set micro_batch=4
t 80 $T 1b full --rows 4
CUT=110 TOP=34 t 110 $O 8b lora --set micro_batch=2 --steps 9 --warm 3 --profile 4
t 90 $T 8b lora --rows 1 --steps 7
CUT=110 TOP=30 t 120 $O 8b full --set micro_batch=1 train.optimizer=adamw_16bit --steps 9 --warm 3 --profile 4
t 90 $T 8b full --rows 1 --steps 7
TOP=3 t 120 $O 8b lora --set micro_batch=2 train.precision=fp8 --steps 8 --warm 3
