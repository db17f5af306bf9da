//! The check `expect`: sends bytes and expects bytes, in one or several steps.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::check::{Expect, Heard, MOST_READ, Reason, Step, part, start_of};
use crate::stream::Stream;

/// Speaks to the server. The error is a short reason.
pub(super) async fn speak(expect: &Expect, mut stream: Stream, heard: &Heard) -> Result<(), Reason> {
    let mut result = Ok(());
    let (mut answer, mut total) = (Vec::new(), 0);
    for (n, step) in expect.steps.iter().enumerate() {
        let is_last = n + 1 == expect.steps.len();
        result = step.speak(&mut stream, &mut answer, &mut total, is_last.then_some(heard)).await;
        if let Err(reason) = result {
            result = Err(reason.of_step((expect.steps.len() > 1).then_some(n + 1), is_last));
            break;
        }
    }
    tokio::spawn(part(stream, expect.goodbye.clone()));
    result
}

impl Step {
    /// Makes the step. `answer` holds what the server has sent and no step has taken yet. `total` counts all bytes that the server has sent.
    async fn speak(
        &self,
        stream: &mut Stream,
        answer: &mut Vec<u8>,
        total: &mut usize,
        heard: Option<&Heard>,
    ) -> Result<(), Reason> {
        let broke = |error: std::io::Error| -> Reason { error.to_string().into() };
        if !self.send.is_empty() {
            // What has come before is no answer to this.
            answer.clear();
            stream.write_all(&self.send).await.map_err(broke)?;
        }
        let mut before = 0;
        loop {
            // Search only the new bytes, plus the end of the old ones where a match may begin.
            let from = before.min(answer.len()).saturating_sub(self.expect.len());
            if let Some(end) = self.end_of_match(answer, from) {
                answer.drain(..end);
                return Ok(());
            }
            let can_become_right = !self.is_prefix || self.expect.starts_with(answer);
            before = answer.len();
            let read = if can_become_right { stream.read_buf(answer).await.map_err(broke)? } else { 0 };
            *total += read;
            // The beginning of the expected answer is not another one.
            if read > 0 && !self.is_prefix {
                heard.map(Heard::set);
            }
            if read == 0 || *total > MOST_READ {
                let text = format!("unexpected answer {:?}", start_of(answer));
                return Err(if answer.is_empty() { text.into() } else { Reason::answer(text) });
            }
        }
    }

    /// Where the expected bytes end in the answer; `None`: they are not there yet. Those before `from` have been searched.
    fn end_of_match(&self, answer: &[u8], from: usize) -> Option<usize> {
        if self.is_prefix {
            return answer.starts_with(&self.expect).then_some(self.expect.len());
        }
        let at = answer[from..].windows(self.expect.len()).position(|window| window == self.expect)?;
        Some(from + at + self.expect.len())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::address::Address;
    use crate::control::health::check::{Check, Kind, Outcome};
    use crate::proxy_header::OwnHeader;

    fn step(send: &str, expect: &str, is_prefix: bool) -> Step {
        Step { send: send.into(), expect: expect.into(), is_prefix }
    }

    /// The outcome of a check against a server that sends these texts, each after it has received something. The second one
    /// is what the server has received.
    async fn check(
        steps: Vec<Step>,
        goodbye: &str,
        greeting: &str,
        answers: &[&'static str],
    ) -> (String, bool, String) {
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = Address::Ip(server.local_addr().unwrap());
        let expect = Expect { steps, goodbye: goodbye.into() };
        let check = Check { kind: Kind::Expect(expect), port: None, send_proxy: OwnHeader::Absent, outgoing: None };
        let serve = async {
            let (mut stream, _) = server.accept().await.unwrap();
            stream.write_all(greeting.as_bytes()).await.unwrap();
            let mut received = Vec::new();
            for answer in answers {
                if stream.read_buf(&mut received).await.unwrap() == 0 {
                    break;
                }
                // In two parts: the first packet does not decide.
                let (one, two) = answer.split_at(answer.len() / 2);
                stream.write_all(one.as_bytes()).await.unwrap();
                tokio::time::sleep(Duration::from_millis(5)).await;
                let _ = stream.write_all(two.as_bytes()).await;
            }
            let _ = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut received)).await;
            String::from_utf8(received).unwrap()
        };
        let (outcome, received) = tokio::join!(check.run("b", &address, Duration::from_secs(10)), serve);
        match outcome {
            Outcome::Passed => ("ok".to_owned(), false, received),
            Outcome::Failed(reason) => (reason.to_string(), reason.is_answer, received),
            Outcome::NotDone(why) => panic!("{why:?}"),
        }
    }

    #[tokio::test]
    async fn steps_follow_one_another_and_the_check_says_goodbye() {
        let steps = || vec![step("", "220 ", true), step("EHLO\n", "250 OK", false), step("ROLE\n", "main", true)];
        let answers = ["250-A\n250 OK\n", "main\n"];
        assert_eq!(
            check(steps(), "QUIT\n", "220 hello\n", &answers).await,
            ("ok".to_owned(), false, "EHLO\nROLE\nQUIT\n".to_owned())
        );
        let (reason, is_answer, received) = check(steps(), "QUIT\n", "220 hello\n", &["250 OK\n", "side\n"]).await;
        assert!(reason.starts_with("step 3: unexpected answer \"si") && is_answer, "{reason}");
        assert_eq!(received, "EHLO\nROLE\nQUIT\n");
        // Only the last step asks for the role.
        let (reason, is_answer, _) = check(steps(), "", "220 hello\n", &["500 what?\n"]).await;
        assert!(reason.starts_with("step 2: unexpected answer \"500") && !is_answer, "{reason}");
        let (reason, is_answer, _) = check(vec![step("x", "y", true)], "", "", &["z"]).await;
        assert_eq!((reason.as_str(), is_answer), ("unexpected answer \"z\"", true));
    }

    #[tokio::test]
    async fn steps_without_send_share_one_answer() {
        let steps = || vec![step("INFO\n", "role:", false), step("", "main", true)];
        assert_eq!(check(steps(), "", "", &["a:1\nrole:main\nb:2\n"]).await.0, "ok");
        let (reason, is_answer, _) = check(steps(), "", "", &["a:1\nrole:side\nb:2\n"]).await;
        assert!(reason.starts_with("step 2: unexpected answer \"s") && is_answer, "{reason}");
    }

    #[tokio::test]
    async fn a_server_that_says_no_and_waits_has_answered() {
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = Address::Ip(server.local_addr().unwrap());
        for (answer, is_answer) in [("role:side", true), ("", false)] {
            let expect = Expect { steps: vec![step("INFO\n", "role:main", false)], goodbye: Vec::new() };
            let check = Check { kind: Kind::Expect(expect), port: None, send_proxy: OwnHeader::Absent, outgoing: None };
            let serve = async {
                let (mut stream, _) = server.accept().await.unwrap();
                stream.write_all(answer.as_bytes()).await.unwrap();
                let _ = stream.read_to_end(&mut Vec::new()).await;
            };
            let (outcome, ()) = tokio::join!(check.run("b", &address, Duration::from_millis(200)), serve);
            let Outcome::Failed(reason) = outcome else { panic!("{outcome:?}") };
            assert_eq!((&*reason, reason.is_answer), ("timeout", is_answer));
        }
    }
}
