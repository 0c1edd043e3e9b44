//! The configuration of `agent start`: flags, variables, a file, and errors in them.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use clap::CommandFactory as _;
use semaphore_agent::commands::cli::Cli;
use serde_json::{Map, Value};

use test_support::start::{Hub, SOON, StartAgent, TOKEN, command, refusal, run};
use test_support::{World, config_keys, job};

/// A file with the required settings.
const NEEDED: &str = "endpoint: hub.example.com\ntoken: canary-registration-token\n";

/// Returns an agent with this text in its file, in addition to the required settings.
fn with_file(world: &World, text: &str) -> Command {
    let mut command = command(world);
    let file = world.file("config.yaml", format!("{NEEDED}{text}"));
    command.arg("--config-file").arg(file);
    command
}

/// Returns the configuration that the agent prints, and its warnings.
fn print(command: &mut Command) -> (String, String) {
    let output = run(command.arg("--print-config"));
    let [printed, warnings] =
        [output.stdout, output.stderr].map(|it| String::from_utf8(it).unwrap());
    assert_eq!(output.status.code(), Some(0), "{command:?}: {warnings}");
    assert!(!format!("{printed}{warnings}").contains("canary"), "{printed}{warnings}");
    (printed, warnings)
}

/// Returns the printed value of one option.
fn line_of<'a>(printed: &'a str, key: &str) -> &'a str {
    let line = printed.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
    line.unwrap_or_else(|| panic!("{key} is missing: {printed}"))
}

#[test]
fn flags_override_variables_which_override_the_file() {
    let world = World::new();
    let options = [
        ("name", "from-file", "from-variable", "from-flag"),
        ("endpoint", "file", "variable:1", "flag:2"),
        ("no-https", "true", "false", "true"),
        ("fail-on-missing-files", "false", "true", "false"),
        ("hook-timeout", "1", "2", "3"),
        ("disconnect-after-idle-timeout", "0", "20", "0"),
        ("upload-job-logs", "always", "when-trimmed", "never"),
        ("env-vars", "[A=1, B=2]", "C=3 D=4", "E=5,F=6"),
        ("files", "[/a:/b]", "/c:/d /e:/f", "/g:/h,/i:/j"),
        ("pre-job-hook-path", "file.sh", "variable.sh", "flag.sh"),
    ];
    let shown = |key: &str, value: &str| match key {
        "env-vars" => Value::from(
            value
                .trim_matches(['[', ']'])
                .split([',', ' '])
                .filter(|pair| !pair.is_empty())
                .map(|pair| format!("{}=…", &pair[..1]))
                .collect::<Vec<_>>(),
        )
        .to_string(),
        "files" => {
            let pairs = value.trim_matches(['[', ']']).split([',', ' ']);
            Value::from(pairs.collect::<Vec<_>>()).to_string()
        }
        "no-https" | "fail-on-missing-files" | "hook-timeout" | "disconnect-after-idle-timeout" => {
            value.to_owned()
        }
        _ => Value::from(value).to_string(),
    };
    let file: String = options.iter().map(|(key, value, ..)| format!("{key}: {value}\n")).collect();
    let file = world.file("config.yaml", format!("token: {TOKEN}\n{file}"));
    for layers in 0..4 {
        let mut agent = command(&world);
        agent.env("SEMAPHORE_AGENT_CONFIG_FILE", &file);
        let (variables, flags) = (layers & 1 != 0, layers & 2 != 0);
        for (key, _, variable, flag) in options {
            if variables {
                agent.env(variable_of(key), variable);
            }
            if flags {
                agent.arg(format!("--{key}={flag}"));
            }
        }
        let (printed, _) = print(&mut agent);
        for (key, in_file, variable, flag) in options {
            let (value, origin) = if flags {
                (flag, "flag".to_owned())
            } else if variables {
                (variable, variable_of(key))
            } else {
                (in_file, file.display().to_string())
            };
            assert_eq!(line_of(&printed, key), format!("{} # {origin}", shown(key, value)));
        }
        let origin = line_of(&printed, "config-file");
        assert_eq!(origin, format!("{file:?} # SEMAPHORE_AGENT_CONFIG_FILE"));
    }
}

fn variable_of(key: &str) -> String {
    format!("SEMAPHORE_AGENT_{}", key.to_uppercase().replace('-', "_"))
}

#[test]
fn the_configuration_is_printed_with_origins_and_without_secrets() {
    let world = World::new();
    let mut agent = with_file(
        &world,
        "name: https://example.com/?signature=canary\nno-https: true\nfiles:\n- /a:/b\n\
         shutdown-hook-path: \"\"\njob-id: ''\nenv-vars: [ONE=canary=1, EMPTY=]\n",
    );
    agent.env("SEMAPHORE_AGENT_HOOK_TIMEOUT", "5").env("SEMAPHORE_AGENT_UPLOAD_JOB_LOGS", "");
    agent.env("SEMAPHORE_AGENT_HOOK_TIMOUT", "canary");
    agent.env("SEMAPHORE_AGENT_FAIL_ON_PRE_JOB_HOOK_ERROR", "T");
    agent.args(["--interruption-grace-period", "60", "--disconnect-after-job"]);
    let (printed, warnings) = print(&mut agent);
    let directory = world.home().with_file_name("");
    let directory = directory.to_str().unwrap();
    let file = format!("{directory}config.yaml");
    let expected = format!(
        r#"config-file: "{file}" # flag
name: "…" # {file}
endpoint: "hub.example.com" # {file}
token: "…" # {file}
no-https: true # {file}
hook-timeout: 5 # SEMAPHORE_AGENT_HOOK_TIMEOUT
fail-on-pre-job-hook-error: true # SEMAPHORE_AGENT_FAIL_ON_PRE_JOB_HOOK_ERROR
source-pre-job-hook: false # default
disconnect-after-job: true # flag
disconnect-after-idle-timeout: 0 # default
interruption-grace-period: 60 # flag
grace-period: 2 # default
env-vars: ["ONE=…","EMPTY=…"] # {file}
files: ["/a:/b"] # {file}
fail-on-missing-files: false # default
docker-socket: always # default
upload-job-logs: never # default
keep-daemons: false # default
log-delivery-timeout: 900 # default
state-dir: "{directory}state" # SEMAPHORE_AGENT_STATE_DIR
ssh-jump-point-path: "{directory}ssh_jump_point" # SEMAPHORE_AGENT_SSH_JUMP_POINT_PATH
kubernetes-executor: false # default
"#
    );
    assert_eq!(printed, expected);
    assert_eq!(
        warnings,
        "warning: unknown variable SEMAPHORE_AGENT_HOOK_TIMOUT; did you mean \
         SEMAPHORE_AGENT_HOOK_TIMEOUT?\n"
    );
    // The printed text could be used as a file, and the agent has started nothing.
    let _: Map<String, Value> = serde_yaml::from_str(&printed).unwrap();
    assert!(!world.state().exists());
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest_known_one() {
    let world = World::new();
    for (text, unknown, nearest, line) in [
        ("hook_timeout: 3\n", "hook_timeout", "hook-timeout", 3),
        (
            "# canary\n\n'disconect-after-job' : true\n",
            "disconect-after-job",
            "disconnect-after-job",
            5,
        ),
        ("name: long-enough\ntokens: canary\n", "tokens", "token", 4),
        ("Endpoint: a\n", "Endpoint", "endpoint", 3),
        ("print-config: true\n", "print-config", "no-https", 3),
    ] {
        let message = refusal(&mut with_file(&world, text));
        let file = world.home().with_file_name("config.yaml");
        let file = file.display();
        let start =
            format!("error: {file}: unknown key `{unknown}` at line {line}; did you mean `");
        assert!(message.starts_with(&start), "{text:?}: {message}");
        assert!(message.ends_with("`?\n"), "{message}");
        let is_near = unknown == "print-config" || message.contains(&format!("`{nearest}`"));
        assert!(is_near, "{text:?}: {message}");
    }
    let mut agent = with_file(&world, "");
    let message = refusal(agent.args(["--hook-timout", "3"]));
    assert!(message.contains("--hook-timout") && message.contains("--hook-timeout"), "{message}");
}

#[test]
fn a_bad_value_is_named_with_its_place_and_the_valid_values() {
    let world = World::new();
    let cases = [
        ("no-https", "yes", "`yes` is not true or false"),
        ("disconnect-after-job", "", "is not true or false"),
        ("hook-timeout", "-1", "`-1` is not a number of seconds from 0 to 4294967295"),
        ("hook-timeout", "1h", "`1h` is not a number of seconds"),
        ("hook-timeout", "0", "`0` leaves no time"),
        ("interruption-grace-period", "1.5", "`1.5` is not a number of seconds"),
        ("log-delivery-timeout", "4294967296", "`4294967296` is not a number of seconds"),
        ("upload-job-logs", "on-failure", "`on-failure` is not never, always or when-trimmed"),
        ("files", "/only-host", "`/only-host` is not HOST:CONTAINER"),
        ("files", "/a:/b:ro", "`/a:/b:ro` is not HOST:CONTAINER"),
        ("files", ":/b", "`:/b` is not HOST:CONTAINER"),
        ("env-vars", "canary", "entry 1 is not NAME=VALUE"),
        ("env-vars", "can-ary=canary", "entry 1 has an invalid variable name"),
        ("name", "seven77", "`seven77` has 7 characters; a name has 8 to 80, or is a URL"),
        ("name-from-env", "NO_SUCH", "there is no name in the variable `NO_SUCH`"),
        ("name-from-env", "SHORT", "`short` has 5 characters"),
        ("endpoint", "https://hub", "`https://hub` is not HOST or HOST:PORT"),
        ("endpoint", "hub/path", "`hub/path` is not HOST or HOST:PORT"),
        ("endpoint", "hub:65536", "`hub:65536` is not HOST or HOST:PORT"),
        ("endpoint", "me@hub", "`me@hub` is not HOST or HOST:PORT"),
        ("endpoint", "hub?x", "`hub?x` is not HOST or HOST:PORT"),
        ("token", "canary\u{1}", "contains characters that are invalid in a token"),
        ("token-file", "missing", "`missing`: No such file"),
        ("token-file", "/dev/null", "`/dev/null`: there is no token in it"),
        ("ca-file", "missing", "`missing` is not a readable file of certificates in PEM"),
        ("ssh-jump-point-path", "relative", "`relative` is not an absolute path"),
        ("job-id", "5c2e", "needs disconnect-after-job"),
        ("kubernetes-executor", "true", "can't run jobs in Kubernetes yet"),
        ("kubernetes-labels", "a=b", "can't run jobs in Kubernetes yet"),
        ("kubernetes-allowed-images", ".*", "can't run jobs in Kubernetes yet"),
        ("kubernetes-pod-spec", "map", "can't run jobs in Kubernetes yet"),
        ("kubernetes-pod-start-timeout", "300", "can't run jobs in Kubernetes yet"),
        ("kubernetes-default-image", "ruby", "can't run jobs in Kubernetes yet"),
    ];
    let base = |key: &str| {
        let mut agent = command(&world);
        agent.env("SHORT", "short").env_remove("SEMAPHORE_AGENT_SSH_JUMP_POINT_PATH");
        if key != "endpoint" {
            agent.env("SEMAPHORE_AGENT_ENDPOINT", "hub");
        }
        if !key.starts_with("token") {
            agent.env("SEMAPHORE_AGENT_TOKEN", TOKEN);
        }
        agent
    };
    let check = |agent: &mut Command, place: &str, why: &str| {
        let message = refusal(agent);
        for word in [place, why] {
            assert!(message.contains(word), "{agent:?}, {word}: {message}");
        }
        message
    };
    for (key, value, why) in cases {
        // clap has its own messages for the values that it refuses.
        let shown = why.split('`').nth(1);
        let in_flag = why.rsplit_once("` is ").map_or(why, |(_, expected)| expected);
        let flag = format!("--{key}");
        let message = check(base(key).arg(format!("{flag}={value}")), &flag, in_flag);
        assert!(message.contains(shown.unwrap_or_default()), "{message}");
        if !value.is_empty() {
            let variable = variable_of(key);
            check(base(key).env(&variable, value), &format!("{variable}: "), why);
        }
        let is_list =
            ["files", "env-vars", "kubernetes-labels", "kubernetes-allowed-images"].contains(&key);
        let in_file = Value::from(value);
        let in_file = if is_list { Value::from(vec![in_file]) } else { in_file };
        let file = world.file("config.yaml", format!("# a line\n{key}: {in_file}\n"));
        let mut agent = base(key);
        agent.arg("--config-file").arg(&file);
        let message = check(&mut agent, &format!("{}: {key}: ", file.display()), why);
        assert!(message.contains(" at line 2"), "{message}");
    }
}

#[test]
fn a_value_of_the_wrong_type_is_named_but_secrets_are_not_shown() {
    let world = World::new();
    for (text, words) in [
        ("env-vars: A=canary\n", &["env-vars", "sequence", "line 3"][..]),
        ("env-vars: {A: canary}\n", &["env-vars", "sequence", "line 3"]),
        ("env-vars:\n- A: canary\n", &["env-vars", "string", "line 4"]),
        ("env-vars:\n- A=1\n- canary\n", &["env-vars", "entry 2", "line 3"]),
        ("token-file: [canary]\n", &["token-file", "string", "line 3"]),
        ("no-https: [true]\n", &["no-https", "true or false", "line 3"]),
        ("hook-timeout: 99999999999999999999\n", &["hook-timeout", "seconds", "line 3"]),
        ("upload-job-logs: {}\n", &["upload-job-logs", "never, always", "line 3"]),
        ("canary\n", &["line"]),
        ("token: canary\n", &["token"]),
        ("config-file: other.yaml\n", &["config-file", "in the file itself", "line 3"]),
        ("token-file: token\n", &["token-file", "token is set too", "line 3"]),
    ] {
        let message = refusal(&mut with_file(&world, text));
        assert!(message.contains("config.yaml"), "{text:?}: {message}");
        for word in words {
            assert!(message.contains(word), "{text:?}, {word}: {message}");
        }
    }
    let both = refusal(
        command(&world)
            .env("SEMAPHORE_AGENT_TOKEN", TOKEN)
            .env("SEMAPHORE_AGENT_TOKEN_FILE", "x")
            .args(["--endpoint", "hub"]),
    );
    assert!(both.contains("SEMAPHORE_AGENT_TOKEN_FILE: token is set too"), "{both}");
    let none = refusal(command(&world).args(["--endpoint", "hub"]));
    assert!(none.contains("SEMAPHORE_AGENT_TOKEN") && none.contains("--token-file"), "{none}");
    let none = refusal(command(&world).env("SEMAPHORE_AGENT_TOKEN", TOKEN));
    assert!(none.contains("endpoint: the control plane's host is required"), "{none}");
    let bad = refusal(with_file(&world, "").env("HTTPS_PROXY", "https://me:canary@proxy"));
    assert!(bad.contains("HTTPS_PROXY: only http: proxies are supported"), "{bad}");
}

#[test]
fn a_token_or_name_overrides_one_from_a_lower_source() {
    let world = World::new();
    let token = world.file("token", format!("{TOKEN}\n"));
    let mut agent = with_file(&world, "name: from-the-file\n");
    agent.arg("--token-file").arg(&token).env("SEMAPHORE_AGENT_NAME_FROM_ENV", "OTHER");
    let (printed, _) = print(agent.env("OTHER", "from-another"));
    assert_eq!(line_of(&printed, "token-file"), format!("{token:?} # flag"));
    let origin = "\"OTHER\" # SEMAPHORE_AGENT_NAME_FROM_ENV";
    assert_eq!(line_of(&printed, "name-from-env"), origin);
    assert!(!printed.contains("\ntoken: ") && !printed.contains("\nname: "), "{printed}");
}

#[test]
fn an_empty_list_counts_and_an_empty_value_in_a_file_is_unset() {
    let world = World::new();
    let empty = "shutdown-hook-path: ''\npre-job-hook-path: \"\"\nname:\nca-file: ''\nfiles: []\n\
                 kubernetes-labels: []\nkubernetes-default-image: ''\nstate-dir: ''\ntoken-file: ''\n";
    let (printed, _) = print(&mut with_file(&world, empty));
    assert_eq!(line_of(&printed, "files").split_once(' ').unwrap().0, "[]");
    for key in ["shutdown-hook-path", "pre-job-hook-path", "name", "ca-file", "token-file"] {
        assert!(!printed.contains(&format!("\n{key}:")), "{printed}");
    }
    let mut agent = with_file(&world, "env-vars: [A=1]\n");
    let (printed, _) = print(agent.arg("--env-vars="));
    assert_eq!(line_of(&printed, "env-vars"), "[] # flag");
}

#[test]
fn variables_for_jobs_keep_their_values() {
    let world = World::new();
    let control_plane = Hub::start(SOON);
    let text = "env-vars:\n- EQUALS=a=b==\n- EMPTY=\n- 'SPACES= a, b '\n- TWICE=1\n- TWICE=2\n- \"LINES=1\\n2\"\n- ours=1\n";
    let file = world.file("config.yaml", text);
    let agent = StartAgent::start_with(&world, &control_plane, |command| {
        command.arg("--config-file").arg(file).env("SEMAPHORE_AGENT_ENV_VAR", "canary");
    });
    let warning =
        "unknown variable SEMAPHORE_AGENT_ENV_VAR; did you mean SEMAPHORE_AGENT_ENV_VARS?";
    agent.wait_for_own_log(warning);
    let script =
        r#"printf '<%s>' "$EQUALS" "${EMPTY-unset}" "$SPACES" "$TWICE" "$LINES" "$ours" "$theirs""#;
    let mut request = job("1", &[script]);
    let variables = [("ours", "Mg=="), ("theirs", "Mg==")];
    request["env_vars"] = variables
        .map(|(name, value)| serde_json::json!({ "name": name, "value": value }))
        .to_vec()
        .into();
    control_plane.queue(request);
    control_plane.wait_for_log("1", "job_finished");
    let log = control_plane.finish("1");
    assert_eq!(log.result(), "passed");
    assert_eq!(log.output(), "<a=b==><>< a, b ><2><1\n2><1><2>");
    let (_, exported, _) = &log.steps()[0];
    let names = ["EMPTY", "EQUALS", "LINES", "SPACES", "TWICE", "ours", "theirs"];
    assert_eq!(*exported, names.map(|name| format!("Exporting {name}\n")).concat());
    drop(agent);
}

#[test]
fn the_example_configuration_has_every_option_with_its_default() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/agent.example.yaml");
    let example = fs::read_to_string(example).unwrap();
    let cli = Cli::command();
    let start = cli.find_subcommand("start").unwrap();
    let flags = start.get_arguments().filter_map(clap::Arg::get_long);
    let not_in_files = ["config-file", "print-config", "help"];
    let flags = flags.filter(|flag| !not_in_files.contains(flag)).map(str::to_owned);
    assert_eq!(config_keys(&example), flags.collect());

    let world = World::new();
    let secret = world.file("token", TOKEN);
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let usable = example.replace("/etc/semaphore-agent/token", secret.to_str().unwrap());
    let file = world.file("config.yaml", &usable);
    let bare = |command: &mut Command| {
        command.env_remove("SEMAPHORE_AGENT_SSH_JUMP_POINT_PATH");
        let (printed, warnings) = print(command);
        assert!(warnings.is_empty(), "{warnings}");
        let lines = printed.lines().map(|line| line.rsplit_once(" # ").unwrap().0);
        let lines = lines.filter(|line| !line.starts_with("config-file: "));
        serde_yaml::from_str::<Map<String, Value>>(&lines.collect::<Vec<_>>().join("\n")).unwrap()
    };
    let mut all = bare(command(&world).arg("--config-file").arg(file));
    // Lists are empty by default, and are not printed then.
    for key in ["env-vars", "files"] {
        assert_eq!(all.remove(key), Some(Value::Array(Vec::new())), "{key}");
    }
    let needed = ["--endpoint", all["endpoint"].as_str().unwrap(), "--token-file"];
    let defaults = bare(command(&world).args(needed).arg(&secret));
    assert_eq!(all, defaults);
    let set: Map<String, Value> = serde_yaml::from_str(&usable).unwrap();
    for key in defaults.keys().filter(|key| *key != "state-dir") {
        assert!(set.contains_key(key), "{key} has a default, but is not in the example");
    }
    for (key, value) in set {
        let help = start.get_arguments().find(|flag| flag.get_long() == Some(&key)).unwrap();
        let help = help.get_help().map(ToString::to_string).unwrap_or_default();
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let default = help.split_once("[default: ").map(|(_, rest)| rest.trim_end_matches(']'));
        let fits = default.is_none_or(|default| default.trim_matches('`') == value);
        assert!(fits, "{key} is {value}, but its help says {default:?}");
    }
}

#[test]
fn a_variable_that_is_not_text_is_refused() {
    let not_text = std::ffi::OsStr::from_bytes(b"\xff");
    let message = refusal(command(&World::new()).env("SEMAPHORE_AGENT_ENDPOINT", not_text));
    assert!(message.contains("SEMAPHORE_AGENT_ENDPOINT: is not UTF-8"), "{message}");
}
