use super::*;
use crate::config::Config;
use crate::job::{Begun, JobJournal};
use transhume_hypervisor::fake::{FakeQemu, definition, settings};
use transhume_relay::source::Journal as _;

struct Scene {
    _folder: tempfile::TempDir,
    daemon: Arc<Daemon>,
    job: Arc<Job>,
    qemu: FakeQemu,
}

/// A host that moved web1, of which `post_copy` and `phase` are noted, and that has the QEMU of that job if
/// it `is_that`, else another one.
async fn scene(phase: Phase, is_that: bool) -> Scene {
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("run");
    let text = format!(
        "host = \"hosta\"\nplain-link = true\nrun-directory = \"{0}/run\"\nstate-directory = \"{0}/state\"\n\
         qemu = \"/none\"\n[hosts.hostb]\naddress = \"127.0.0.1:1\"\n",
        folder.path().display()
    );
    let config = Config::parse(&text).expect("a configuration");
    let daemon = Daemon::open(config).await.expect("a service");
    let gone = FakeQemu::start(&run, "gone");
    let qemu = FakeQemu::start(&run, "web1");
    let moved = if is_that { &qemu } else { &gone }.identity();
    let begun = Begun {
        vm: "web1",
        qemu: Some(&moved),
        from: "hosta",
        to: "hostb",
        dry_run: false,
    };
    let job = daemon.jobs.begin(begun).expect("a job");
    gone.end(false);
    job.progress().enter(phase);
    let journal = JobJournal {
        jobs: Arc::clone(&daemon.jobs),
        job: Arc::clone(&job),
    };
    journal.note(7, true).expect("noted");
    let vm = qemu.vm(&definition("web1"), &settings(&run)).await;
    daemon.table.put(Arc::new(vm));
    Scene {
        _folder: folder,
        daemon,
        job,
        qemu,
    }
}

impl Scene {
    /// As the relay gives up: the phase says nothing any more.
    fn falls_into_doubt(&self) {
        self.job.progress().enter(Phase::Unresolved);
        let text = in_doubt(&self.job.info(), "no answer");
        self.daemon.jobs.finish(&self.job, Ending::InDoubt(text));
    }

    async fn resolve(&self, runs_at: &str) -> Result<Response> {
        self.daemon.resolve(self.job.id(), runs_at).await
    }

    fn has_ended_as(&self, state: JobState, words: &str) {
        let info = self.job.info();
        let error = info.error.unwrap_or_default();
        assert_eq!((info.state, info.in_doubt), (state, false), "{error}");
        assert!(error.contains(words), "{error}");
    }

    /// Nothing was done to the QEMU that is here.
    fn is_left_alone(&self) {
        assert!(self.qemu.is_alive());
        assert!(self.daemon.table.here("web1").is_ok());
        let commands = self.qemu.commands();
        let touched = ["quit", "cont", "migrate_cancel"];
        assert!(!commands.iter().any(|one| touched.contains(&one.as_str())));
    }
}

#[tokio::test]
async fn memory_that_is_here_alone_outlives_every_word() {
    for migration in ["postcopy-active", "postcopy-paused", "postcopy-recover"] {
        let scene = scene(Phase::PostCopy, true).await;
        scene.qemu.set_migration(migration);
        scene.falls_into_doubt();
        let error = scene.resolve("hosta").await.expect_err("it cannot go back");
        assert!(error.to_string().contains("--runs-at hostb"), "{error}");
        assert!(scene.job.info().in_doubt);
        scene.is_left_alone();
        scene.resolve("hostb").await.expect("it goes on");
        assert!(scene.job.is_running() && !scene.job.info().in_doubt);
        scene.is_left_alone();
    }
}

#[tokio::test]
async fn qemu_is_asked_also_where_nothing_of_post_copy_is_noted() {
    let scene = scene(Phase::Commit, true).await;
    scene.qemu.set_migration("postcopy-paused");
    scene.falls_into_doubt();
    scene.resolve("hostb").await.expect("it goes on");
    assert!(scene.job.is_running());
    scene.is_left_alone();
}

#[tokio::test]
async fn a_vm_that_moved_is_ended_here() {
    let scene = scene(Phase::Commit, true).await;
    scene.qemu.set_migration("completed");
    scene.falls_into_doubt();
    scene.resolve("hostb").await.expect("settled");
    scene.has_ended_as(JobState::Completed, "was taken over by hostb");
    assert!(!scene.qemu.is_alive());
    assert!(scene.daemon.table.here("web1").is_err());
}

#[tokio::test]
async fn a_vm_that_moved_and_whose_qemu_ended_meanwhile_leaves_nothing() {
    let scene = scene(Phase::Commit, true).await;
    let vm = scene.daemon.table.here("web1").expect("it runs");
    let record = scene.daemon.table.record(&vm);
    scene.qemu.end(true);
    scene.daemon.table.stop(record, |_| true, "it ended");
    scene.falls_into_doubt();
    scene.resolve("hostb").await.expect("settled");
    scene.has_ended_as(JobState::Completed, "was taken over by hostb");
    assert!(scene.daemon.table.entry("web1").is_err());
    assert!(!vm.files().folder().exists());
}

#[tokio::test]
async fn another_vm_of_that_name_is_left_alone() {
    for phase in [Phase::Commit, Phase::PostCopy] {
        for (runs_at, state) in [("hostb", JobState::Completed), ("hosta", JobState::Failed)] {
            let scene = scene(phase, false).await;
            scene.qemu.set_migration("completed");
            scene.falls_into_doubt();
            scene.resolve(runs_at).await.expect("settled");
            scene.has_ended_as(state, "is another one");
            scene.is_left_alone();
        }
    }
}

#[tokio::test]
async fn a_stale_job_lets_no_other_vm_run() {
    let scene = scene(Phase::PreCopy, false).await;
    scene.daemon.finish_one(&scene.job).await;
    scene.has_ended_as(JobState::Failed, "is another one");
    scene.is_left_alone();
}

#[tokio::test]
async fn a_vm_that_was_not_given_away_goes_on() {
    let scene = scene(Phase::PreCopy, true).await;
    scene.daemon.finish_one(&scene.job).await;
    scene.has_ended_as(JobState::Failed, "runs on here");
    assert!(scene.qemu.commands().iter().any(|one| one == "cont"));
}

#[tokio::test]
async fn a_qemu_that_cannot_be_spoken_to_is_not_taken_for_one_that_ended() {
    let scene = scene(Phase::Commit, true).await;
    let Ok(Entry::Here(vm)) = scene.daemon.table.entry("web1") else {
        panic!("it is here");
    };
    let record = scene.daemon.table.record(&vm);
    scene.daemon.table.lose(record, "it hangs".to_owned());
    scene.falls_into_doubt();
    for runs_at in ["hosta", "hostb"] {
        let error = scene.resolve(runs_at).await.expect_err("it is silent");
        assert!(error.to_string().contains("it hangs"), "{error}");
        assert!(scene.job.info().in_doubt && scene.qemu.is_alive());
    }
}

#[tokio::test]
async fn an_operator_may_give_up_what_is_cut_off() {
    let scene = scene(Phase::PostCopy, true).await;
    scene.qemu.set_migration("postcopy-paused");
    scene.falls_into_doubt();
    let stop = |force| transhume_api::Request::VmStop {
        name: "web1".to_owned(),
        force,
        shutdown_timeout: None,
    };
    let answer = scene.daemon.handle(stop(false)).await;
    assert!(matches!(answer, Response::Error(_)), "{answer:?}");
    scene.is_left_alone();
    let answer = scene.daemon.handle(stop(true)).await;
    assert!(matches!(answer, Response::Done(_)), "{answer:?}");
    assert!(!scene.qemu.is_alive());
}
