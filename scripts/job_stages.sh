# Read by the launch scripts: which stages of a job run where. Sets `together` and `alone` from a comma-separated list.
#
#   together  score, select and finetune: all processes of the job take part
#   alone     export, evaluate and report: one process, on the first host, when the others are done
split_stages() {
  local stage stages
  together="" alone=""
  IFS=, read -ra stages <<<"$1"
  for stage in "${stages[@]}"; do
    case "$stage" in
      score | select | finetune) together+="${together:+,}$stage" ;;
      export | evaluate | report) alone+="${alone:+,}$stage" ;;
      *)
        echo "error: LARK_STAGES: '$stage' is none of score, select, finetune, export, evaluate and report" >&2
        return 2
        ;;
    esac
  done
}
