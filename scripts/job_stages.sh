# Sourced by the launch scripts: which stages of a job run where. Splits LARK_STAGES into
#
#   stages    all of them: every call checks what any of them needs, so that nothing is missing after hours of training
#   together  score, select and finetune: all processes of the job
#   single    export, evaluate and report: one process, on the first host, after the others
#
# The arguments are those for lark_jax, which must not name stages.
split_stages() {
  local argument stage names
  for argument in "$@"; do
    case "$argument" in
      --config.stages* | --only*)
        echo "error: $argument: set LARK_STAGES instead, for example LARK_STAGES=score,select" >&2
        return 2
        ;;
    esac
  done
  stages="${LARK_STAGES:-score,select,finetune,export}" together="" single=""
  IFS=, read -ra names <<<"$stages"
  for stage in "${names[@]}"; do
    case "$stage" in
      score | select | finetune) together+="${together:+,}$stage" ;;
      export | evaluate | report) single+="${single:+,}$stage" ;;
      *)
        echo "error: LARK_STAGES: '$stage' is not one of score, select, finetune, export, evaluate and report" >&2
        return 2
        ;;
    esac
  done
}
