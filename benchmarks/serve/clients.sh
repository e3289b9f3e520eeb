#!/usr/bin/env sh
# Other people's clients against a running `burnish serve burnish-sql-base --max-queue 3000`, unchanged.
#
#   sh benchmarks/serve/clients.sh http://127.0.0.1:8000 [TOKENIZER_FOLDER]
#
# Run from the repository root; schemathesis, lm_eval and guidellm on the path.
set -eu
url=$1
tokenizer=${2:-src/burnish/data/assets/burnish-sql-base}
model=${MODEL:-burnish-sql-base}
checks=not_a_server_error,status_code_conformance,content_type_conformance
checks=$checks,response_headers_conformance,response_schema_conformance

for mode in negative positive; do
    schemathesis run "$url/openapi.json" --mode "$mode" --max-examples 500 --seed 1 --phases fuzzing \
        --suppress-health-check all --no-color --request-timeout 60 --workers 2 --checks "$checks"
done

lm_eval --model local-completions --batch_size 4 --include_path benchmarks/serve/lm_eval_task \
    --model_args "model=$model,base_url=$url/v1/completions,num_concurrent=4,max_retries=1,tokenizer=$tokenizer" \
    --tasks sql_continuation,sql_writing

guidellm run --backend "kind=openai_http,target=$url,model=$model" --profile kind=concurrent,streams=8 \
    --constraint kind=max_requests,count=64 --tokenizer "kind=huggingface_auto,model=$tokenizer" \
    --data kind=synthetic_text,prompt_tokens=64,output_tokens=48 --output kind=console --disable-progress
