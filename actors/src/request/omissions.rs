//! Finds what the author of a job file has left out. Over the wire a missing field is empty; in a
//! file it would be a command or a variable that silently does nothing, so it is an error.

use super::values::{RawEnvVar, RawFile};
use super::{FileRequest, List, NoJobId, OnlyMap, RawCommand, problem};
use crate::job::Problems;

impl FileRequest {
    /// Returns a problem for each command without `directive`, variable without `value` and file
    /// without `content`, and for a missing `job_id`. The latter is set, so that [`Self::decode`]
    /// can check the rest of the request.
    pub fn take_omissions(&mut self) -> Problems {
        let mut problems = Problems::new();
        if self.job_id.is_empty() {
            problems.push(problem("job_id".into(), NoJobId.to_string()));
            "unnamed".clone_into(&mut self.job_id);
        }
        let compose = &self.compose.0;
        for (at, commands) in [
            ("commands", &self.commands),
            ("epilogue_always_commands", &self.epilogue_always_commands),
            ("epilogue_on_pass_commands", &self.epilogue_on_pass_commands),
            ("epilogue_on_fail_commands", &self.epilogue_on_fail_commands),
            ("compose.host_setup_commands", &compose.host_setup_commands),
        ] {
            commands_without_directive(at, commands, &mut problems);
        }
        variables_and_files("", &self.env_vars, &self.files, &mut problems);
        for (index, OnlyMap(container)) in compose.containers.iter().enumerate() {
            let at = format!("compose.containers[{index}].");
            variables_and_files(&at, &container.env_vars, &container.files, &mut problems);
        }
        for (index, OnlyMap(credentials)) in compose.image_pull_credentials.iter().enumerate() {
            let at = format!("compose.image_pull_credentials[{index}].");
            variables_and_files(&at, &credentials.env_vars, &credentials.files, &mut problems);
        }
        problems
    }
}

fn commands_without_directive(
    at: &str,
    commands: &List<OnlyMap<RawCommand>>,
    problems: &mut Problems,
) {
    for (index, OnlyMap(command)) in commands.iter().enumerate() {
        if command.directive.is_none() {
            problems.push(problem(
                format!("{at}[{index}]"),
                "the command has no `directive`; it is a string, and '' to run nothing",
            ));
        }
    }
}

fn variables_and_files(
    at: &str,
    variables: &List<OnlyMap<RawEnvVar>>,
    files: &List<OnlyMap<RawFile>>,
    problems: &mut Problems,
) {
    let missing = |what: &str, index: usize, key: &str| {
        let path = format!("{at}{what}[{index}]");
        problem(path, format!("`{key}` is missing: base64, or '' if it is empty"))
    };
    let values = variables.iter().enumerate().filter(|(_, OnlyMap(raw))| raw.value.is_none());
    problems.extend(values.map(|(index, _)| missing("env_vars", index, "value")));
    let contents = files.iter().enumerate().filter(|(_, OnlyMap(raw))| raw.content.is_none());
    problems.extend(contents.map(|(index, _)| missing("files", index, "content")));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_omission_is_reported_with_its_path() {
        let mut request: FileRequest = serde_json::from_str(
            r#"{"commands":[{"directive":"a"},{"alias":"b"},{"directive":""}],
                "epilogue_commands":[{}],
                "env_vars":[{"name":"A","value":""},{"name":"B"}],
                "file":[{"path":"a","mode":"644","content":""},{"path":"b","mode":"644"}],
                "compose":{"containers":[{"env_vars":[{"name":"C"}]}],
                           "image_pull_credentials":[{"files":[{}]}],
                           "host_setup_commands":[{"alias":"x"}]}}"#,
        )
        .unwrap();
        let places: Vec<_> =
            request.take_omissions().into_iter().map(|problem| problem.path).collect();
        assert_eq!(
            places,
            [
                "job_id",
                "commands[1]",
                "epilogue_always_commands[0]",
                "compose.host_setup_commands[0]",
                "env_vars[1]",
                "files[1]",
                "compose.containers[0].env_vars[0]",
                "compose.image_pull_credentials[0].files[0]"
            ]
        );
        assert!(request.take_omissions().iter().all(|problem| problem.path != "job_id"));
        assert!(request.decode().is_ok());
    }
}
