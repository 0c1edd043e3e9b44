__agent_begin() {
  builtin local __agent_status="$?"
  [[ ! ${1-} ]] || builtin set "-$1"
  # The job may have one of its own, and keeps it; to one that is readonly nothing can be added.
  [[ ${PROMPT_COMMAND-} == *__agent_end* || ${__agent_no_prompt-} ]] ||
    PROMPT_COMMAND+=${PROMPT_COMMAND:+$'\n'}'{ [[ ! ${__agent_running-} ]] || __agent_end; } 2>/dev/null'
  __agent_running=1
  builtin return "$__agent_status"
}
__agent_end() {
  # Quoted, as to `builtin` these are words like any others, and the job's IFS may have digits.
  builtin local __agent_status="$?" __agent_flags="$-" __agent_mark __agent_result="${SEMAPHORE_JOB_RESULT-}" __agent_ask
  builtin set +vx
  # A line editor shows what is typed.
  [[ :$SHELLOPTS: != *:emacs:* && :$SHELLOPTS: != *:vi:* ]] || __agent_flags+=@
  [[ ! ${PS1-}${PS2-} ]] || builtin unset PS1 PS2 2>/dev/null
  __agent_result=${__agent_result:0:64}
  # In parts, as `declare -f` shows `$'…'` as the bytes it stands for: its output would ask, too.
  # The terminal's echo is off before the prompt is there, whatever the job has set.
  __agent_ask=$'\001'@ASK@$'\001'
  while :; do
    IFS= builtin read -rs -p "$__agent_ask" __agent_mark </dev/tty 2>/dev/tty
    # A trapped signal may end it early. The answer still comes, and only one.
    [[ $? -gt 128 ]] || builtin break
    __agent_ask=
  done
  builtin printf -v __agent_ask '\001%s %s %s %s\001' "$__agent_mark" "$__agent_status" "$__agent_flags" \
    "${__agent_result//[[:cntrl:]]/?}"
  __agent_running=
  __agent_tell "$__agent_ask"
  builtin return "$__agent_status"
}
__agent_tell() {
  builtin printf %s "$1" >/dev/tty
}
builtin unset PROMPT_COMMAND 2>/dev/null || __agent_no_prompt=1
builtin unset PS0 MAILCHECK 2>/dev/null
builtin set +o history
builtin history -c
builtin unset HISTFILE
__agent_running=1
