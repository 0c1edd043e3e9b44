# These functions are defined while aliases are off, and must work whatever the job defines:
# - They call only `builtin`; a function of that name is removed at the end of each script.
# - They assign to no variable that may be readonly.
# - They do not call each other, as FUNCNEST may limit calls to one level.
__agent_ok() {
  [[ 1 ]]
}
__agent_prompt() {
  builtin printf -v PS1 '\\001%s %s\\001' @PROMPT@ "${__agent_at-}"
}
__agent_ready() {
  # The prompt command is added to the job's own one. If the job sets a prompt, the session's is set again.
  [[ ${PROMPT_COMMAND-} == *__agent_prompt* ]] ||
    builtin printf -v PROMPT_COMMAND '%s\n%s' "${PROMPT_COMMAND-}" '{ [[ ! ${PS1-} || $PS1 == *@PROMPT@* ]] || \__agent_prompt; } 2>/dev/null' 2>/dev/null
  builtin printf -v __agent_at %s "$3" 2>/dev/null
  # The frame is written with prompt escapes, so that printing the variable prints no frame.
  builtin printf -v PS1 '\\001%s %s\\001' @PROMPT@ "$3" 2>/dev/null
  [[ ! ${2-} ]] || builtin shopt -s expand_aliases
  builtin return "$1"
}
__agent_begin() {
  builtin printf '\001%s\001' "$2" >/dev/tty
  [[ ${3-} != *+* ]] || builtin set -o vi
  [[ ${3-} != *=* ]] || builtin set -o emacs
  [[ ${3-} != *~* ]] || builtin set -o history
  [[ ${3-} != *%* ]] || builtin shopt -s extdebug
  [[ ! ${4-} ]] || builtin set "-$4"
  builtin return "$1"
}
__agent_end() {
  # Special builtins are found before functions only in POSIX mode.
  [[ :$3: == *:posix:* ]] || POSIXLY_CORRECT=y
  if unset -f builtin && set +vxET && { [[ :$3: == *:posix:* ]] || set +o posix; } && builtin printf -v __agent_line .. &&
    [[ $__agent_line == .. ]] &&
    builtin set +o emacs +o vi +o history && builtin shopt -u expand_aliases && builtin unset -v __agent_line &&
    builtin read -rn 0 __agent_line </dev/null && builtin . /dev/null; then
    builtin shopt -u extdebug
    # Leaving POSIX mode has reset these options.
    [[ :$4: == *:inherit_errexit:* ]] || builtin shopt -u inherit_errexit
    [[ :$4: == *:interactive_comments:* ]] || builtin shopt -u interactive_comments
    [[ :$4: == *:sourcepath:* ]] || builtin shopt -u sourcepath
    [[ :$4: != *:shift_verbose:* ]] || builtin shopt -s shift_verbose
    [[ :$4: != *:expand_aliases:* ]] || builtin set -- "$1" "$2@" "$3" "$4" "$5"
    [[ :$4: != *:extdebug:* ]] || builtin set -- "$1" "$2%" "$3" "$4" "$5"
    [[ :$3: != *:vi:* ]] || builtin set -- "$1" "$2+" "$3" "$4" "$5"
    [[ :$3: != *:emacs:* ]] || builtin set -- "$1" "$2=" "$3" "$4" "$5"
    [[ :$3: != *:history:* ]] || builtin set -- "$1" "$2~" "$3" "$4" "$5"
    builtin unset PS0 PS1 PS2
    @MARK@
    builtin set -- "$1" "$2" "${SEMAPHORE_JOB_RESULT-}"
    builtin set -- "$1" "$2" "${3:0:64}"
    builtin printf -v __agent_line '\001%s %s %s %s\001' "${__agent_line:0:32}" "$1" "$2" "${3//[[:cntrl:]]/?}"
    @TELL@
    builtin unset -v __agent_line __agent_at __agent_options __agent_boot
  fi 2>/dev/null
  builtin return "$1"
}
builtin unset PROMPT_COMMAND PS0 MAILCHECK 2>/dev/null
builtin set +o history
builtin history -c
builtin unset HISTFILE 2>/dev/null
# A pager would wait for a key on the job's terminal.
[[ ${PAGER+set}${GIT_PAGER+set} ]] || {
  builtin printf -v PAGER cat
  builtin printf -v GIT_PAGER cat
  builtin export PAGER GIT_PAGER
}
