#!/usr/bin/env bash
# Ten steps of SFT and of DPO with the embedded demo model on one Gaudi card, eager and lazy.
#
#   scripts/hpu_smoke.sh [FOLDER]              runs it; FOLDER (default: hpu-smoke) gets everything
#   scripts/hpu_smoke.sh FOLDER --dry_run      only shows that the commands are understood
#
# It needs Habana's container and tandem in it (docs/internals/gaudi.md). At the end it prints what to send
# back. PYTHON names the interpreter, STEPS another number of steps, ONLY the runs to make (a
# pattern such as 'dpo-lazy-*').
set -euo pipefail

folder=${1:-hpu-smoke}
shift || true
python=${PYTHON:-python3}
steps=${STEPS:-10}
only=${ONLY:-*}

mkdir -p "$folder"
"$python" - "$folder" <<'MAKE'
import json, random, sys

random.seed(0)
words = "red green blue one two three sun moon star sea river stone bird".split()
folder = sys.argv[1]
with open(f"{folder}/conversations.jsonl", "w") as chats, open(f"{folder}/pairs.jsonl", "w") as pairs:
    for _ in range(80):
        question = "Say " + " ".join(random.choices(words, k=random.randint(1, 40)))
        good, bad = (" ".join(random.choices(words, k=random.randint(1, 30))) for _ in range(2))
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": good}]
        chats.write(json.dumps({"conversations": turns}) + "\n")
        row = {"system": "", "question": question, "chosen": good, "rejected": bad}
        pairs.write(json.dumps(row) + "\n")
MAKE

common=(--model_name_or_path demo:base --device hpu --batch_size 8 --max_steps "$steps"
        --warmup_steps 0 --learning_rate 1e-3 --max_length 256 --logging_steps 1 --save_steps "$steps"
        --chat_template neural-chat)

failed=()

# run NAME COMMAND...: its output in FOLDER/NAME.log, its exit code beside it.
run() {
    local name=$1 code=0
    shift
    # shellcheck disable=SC2053 # a pattern
    if [[ $name != $only ]]; then return; fi
    echo "== $name"
    "$python" -m tandem "$@" >"$folder/$name.log" 2>&1 || code=$?
    tail -n 3 "$folder/$name.log"
    echo "$code" >"$folder/$name.code"
    if [ "$code" -ne 0 ]; then failed+=("$name"); fi
}

for lazy in false true; do
    mode=$([ "$lazy" = true ] && echo lazy || echo eager)
    for dtype in float32 bfloat16; do
        for stage in sft dpo; do
            data=$([ "$stage" = sft ] && echo conversations || echo pairs)
            name="$stage-$mode-$dtype"
            run "$name" "$stage" "${common[@]}" --dataset_name "$folder/$data.jsonl" \
                --output_dir "$folder/$name" --dtype "$dtype" --use_lazy_mode "$lazy" \
                --tokens_per_microbatch 512 "$@"
        done
    done
done
run sft-pad-max sft "${common[@]}" --dataset_name "$folder/conversations.jsonl" \
    --output_dir "$folder/sft-pad-max" --dtype bfloat16 --pad_max true "$@"
run sft-fused sft "${common[@]}" --dataset_name "$folder/conversations.jsonl" \
    --output_dir "$folder/sft-fused" --dtype bfloat16 --hpu_fused_attention true \
    --hpu_fused_optimizer true --tokens_per_microbatch 512 "$@"

{
    "$python" -m tandem --version || true
    "$python" -m pip list 2>/dev/null | grep -i -E '^(torch|habana|transformers|accelerate|peft)' || true
    command -v hl-smi >/dev/null && hl-smi || echo "hl-smi is not here"
} >"$folder/versions.txt" 2>&1

echo
if [ "${#failed[@]}" -gt 0 ]; then echo "failed: ${failed[*]}"; else echo "all commands ended with 0"; fi
echo "Losses of eager and lazy mode in float32 should agree to about 1e-4, and step_seconds should"
echo "be steady after the first steps: a shape that is compiled again shows as a slow step."
echo "Please send back: $folder/*.log, $folder/*.code, $folder/versions.txt, $folder/*/metrics.jsonl"
echo "and $folder/*/summary.json, for example"
echo "  tar czf hpu-smoke.tgz $folder/*.log $folder/*.code $folder/versions.txt \\"
echo "      $folder/*/metrics.jsonl $folder/*/summary.json"
[ "${#failed[@]}" -eq 0 ]
