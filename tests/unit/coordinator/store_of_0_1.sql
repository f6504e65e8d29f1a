-- The store that paceline 0.1 wrote, before it had revisions: one job, running, with a report and a request id.
BEGIN TRANSACTION;
CREATE TABLE history (
	job INTEGER NOT NULL, 
	place INTEGER NOT NULL, 
	state TEXT NOT NULL, 
	reason TEXT NOT NULL, 
	message TEXT NOT NULL, 
	time_microseconds INTEGER NOT NULL, 
	PRIMARY KEY (job, place), 
	FOREIGN KEY(job) REFERENCES jobs (number)
);
INSERT INTO "history" VALUES(1,0,'QUEUED','Submitted','accepted; the scheduler has not looked at it yet',1767355200123456);
INSERT INTO "history" VALUES(1,1,'STARTING','Launching','launching 1 rank',1767355201123456);
INSERT INTO "history" VALUES(1,2,'RUNNING','Training','the ranks report progress',1767355203123456);
CREATE TABLE jobs (
	number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id TEXT NOT NULL, 
	spec BLOB NOT NULL, 
	state TEXT NOT NULL, 
	reason TEXT NOT NULL, 
	message TEXT NOT NULL, 
	attempt INTEGER NOT NULL, 
	queue_position INTEGER NOT NULL, 
	token_digest TEXT, 
	pid INTEGER, 
	start_ticks INTEGER, 
	summary BLOB, 
	UNIQUE (id)
);
INSERT INTO "jobs" VALUES(1,'digits-000000',X'0A066469676974734001','RUNNING','Training','the ranks report progress',1,0,'digest',12,345,NULL);
CREATE TABLE reports (
	number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	job INTEGER NOT NULL, 
	attempt INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	report BLOB NOT NULL, 
	FOREIGN KEY(job) REFERENCES jobs (number)
);
INSERT INTO "reports" VALUES(1,1,1,1,X'0801210000000000000040');
CREATE TABLE requests (
	request_id TEXT NOT NULL, 
	job INTEGER NOT NULL, 
	PRIMARY KEY (request_id), 
	FOREIGN KEY(job) REFERENCES jobs (number)
);
INSERT INTO "requests" VALUES('once',1);
CREATE INDEX ix_jobs_state ON jobs (state);
CREATE INDEX reports_by_step ON reports (job, step);
CREATE INDEX reports_by_number ON reports (job, number);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('jobs',1);
INSERT INTO "sqlite_sequence" VALUES('reports',1);
COMMIT;
PRAGMA user_version = 1;
