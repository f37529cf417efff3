# Sourced by the launch scripts: which stages of a job run where. Splits a comma-separated list into
#
#   together  score, select and finetune: all processes of the job
#   single    export, evaluate and report: one process, on the first host, after the others
split_stages() {
  local stage stages
  together="" single=""
  IFS=, read -ra stages <<<"$1"
  for stage in "${stages[@]}"; do
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
